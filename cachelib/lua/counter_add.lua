-- Add to a whole number, and give it a TTL when this creates it.
--
-- KEYS: entry
-- ARGV: amount, ttl_ms
-- RETURNS: the new value, as text (a Lua number would lose digits beyond 2^53)
--
-- One script, because a client that dies between INCRBY and PEXPIRE would leave a counter for ever.

redis.call("INCRBY", KEYS[1], ARGV[1])
if redis.call("PTTL", KEYS[1]) < 0 then
    redis.call("PEXPIRE", KEYS[1], ARGV[2])
end
return redis.call("GET", KEYS[1])
