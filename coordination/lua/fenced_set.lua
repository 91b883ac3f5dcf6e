-- Set a value, unless a hold with a higher fence has set it.
--
-- KEYS: entry
-- ARGV: fence, ttl_ms, value
-- RETURNS: 1 if it was set, 0 if the fence is out of date
--
-- One script, because between a look at the fence and the change of the value a later hold could change it. Fences are
-- whole microseconds below 2^53, which Lua compares exactly.

local entry = KEYS[1]
local known = tonumber(redis.call("HGET", entry, "fence") or 0)
if tonumber(ARGV[1]) < known then
    return 0
end
redis.call("HSET", entry, "fence", ARGV[1], "value", ARGV[3])
redis.call("PEXPIRE", entry, ARGV[2])
return 1
