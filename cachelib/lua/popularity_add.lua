-- Add to the ranking of calls.
--
-- KEYS: ranking
-- ARGV: ttl_ms, calls..., counts...
-- RETURNS: how many calls were added to
--
-- One script, because a ranking without a TTL would stay for ever if the client died half way.

local count = (#ARGV - 1) / 2
for i = 1, count do
    redis.call("ZINCRBY", KEYS[1], ARGV[1 + count + i], ARGV[1 + i])
end
redis.call("PEXPIRE", KEYS[1], ARGV[1])
return count
