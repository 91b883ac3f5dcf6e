-- USES: _turns
-- Set how many units there are, for all processes, whatever they were told; 0 forgets it.
--
-- KEYS: state, queue
-- ARGV: capacity, units
-- RETURNS: how many are in use
--
-- One script, because units that are added are granted at once to those who wait. Units in use are not taken away.

local state, queue = KEYS[1], KEYS[2]
if tonumber(ARGV[2]) > 0 then
    redis.call("HSET", state, "capacity", ARGV[2])
else
    redis.call("HDEL", state, "capacity")
end
local turn = turn_open(state, queue, turn_now(), ARGV[1], "")
turn.kept = 0 -- it is to be kept for another time now
turn_settle(state, queue, turn)
turn_close(state, queue, turn)
return turn.used
