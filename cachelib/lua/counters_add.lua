-- Add to several counters that all processes share, and keep them for a while.
--
-- KEYS: counters
-- ARGV: ttl_ms, fields..., amounts...
-- RETURNS: how many fields were changed
--
-- One script, because counters without a TTL would stay for ever if the client died half way.

local count = (#ARGV - 1) / 2
for i = 1, count do
    redis.call("HINCRBY", KEYS[1], ARGV[1 + i], ARGV[1 + count + i])
end
redis.call("PEXPIRE", KEYS[1], ARGV[1])
return count
