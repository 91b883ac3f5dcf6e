-- USES: _parking
-- Know nothing more of a parked task. Its line finds that out by itself.
--
-- KEYS: waits, parked, woken, due
-- ARGV: id, sent_as
-- RETURNS: 1 if it was known, else 0
-- sent_as: only if this attempt of it has been sent, and has not come. Empty: whatever it does.
--
-- One script, because what is written of it in four places must go together.

local waits, parked, woken, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known = park_look(waits, ARGV[1])
if ARGV[2] ~= "" and not (known and known.mode == "s" and known.token == ARGV[2]) then
    return 0
end
park_forget(waits, parked, woken, due, ARGV[1])
return known and 1 or 0
