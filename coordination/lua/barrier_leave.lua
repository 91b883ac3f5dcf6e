-- Leave a barrier before it opens.
--
-- KEYS: state, arrived, opened
-- ARGV: token
-- RETURNS: the place of one that may pass, for the barrier opened meanwhile; -1 if it has left, or was not there
--
-- One script, because a barrier that opens between a look and the leaving would count one that does not pass.

local passed = redis.call("ZSCORE", KEYS[3], ARGV[1])
if passed then
    return tonumber(passed) % 16384
end
redis.call("ZREM", KEYS[2], ARGV[1])
redis.call("HDEL", KEYS[1], "w" .. ARGV[1])
return -1
