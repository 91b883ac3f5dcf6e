-- USES: _parking
-- Know nothing more of a parked task. Its line finds that out by itself.
--
-- KEYS: waits, parked, woken, due
-- ARGV: id, if_sent
-- RETURNS: 1 if it was known, else 0
-- if_sent: 1: only if it has been sent, and has not come.
--
-- One script, because what is written of it in four places must go together.

local waits, parked, woken, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known = park_look(waits, ARGV[1])
if ARGV[2] == "1" and not (known and known.mode == "s") then
    return 0
end
park_forget(waits, parked, woken, due, ARGV[1])
return known and 1 or 0
