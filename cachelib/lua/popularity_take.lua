-- The calls at the head of a ranking; then halve it, and drop its tail.
--
-- KEYS: ranking
-- ARGV: top, kept
-- RETURNS: {calls}, the most requested first
--
-- One script, because two warmers at once would otherwise halve what the other had not read. ZUNIONSTORE
-- makes a new set without a TTL, so the TTL is put back in the same step.

local left_ms = redis.call("PTTL", KEYS[1])
if left_ms < 0 then
    return {}
end
redis.call("ZREMRANGEBYRANK", KEYS[1], 0, -1 - tonumber(ARGV[2]))
local calls = redis.call("ZREVRANGE", KEYS[1], 0, tonumber(ARGV[1]) - 1)
redis.call("ZUNIONSTORE", KEYS[1], 1, KEYS[1], "WEIGHTS", "0.5")
redis.call("ZREMRANGEBYSCORE", KEYS[1], "-inf", "(0.1")
redis.call("PEXPIRE", KEYS[1], left_ms)
return calls
