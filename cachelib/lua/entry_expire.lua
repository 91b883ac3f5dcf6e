-- Make an entry stale, but keep it for those who may be served stale values; void the load that is under way.
--
-- KEYS: entry, lease
-- ARGV: none
-- RETURNS: 1 there was an entry, 0 there was none
--
-- One script, because the stale window stands in the entry, and another entry must not get it.

redis.call("DEL", KEYS[2])
local entry = redis.pcall("GETRANGE", KEYS[1], 0, 13)
if entry == "" then
    return 0
elseif type(entry) ~= "string" then -- another kind of key: no entry, and nobody's
    redis.call("UNLINK", KEYS[1])
    return 1
end
local stale_ms = tonumber(string.sub(entry, 5, 14), 16) or 0
if stale_ms == 0 then
    redis.call("UNLINK", KEYS[1])
elseif redis.call("PTTL", KEYS[1]) > stale_ms then
    redis.call("PEXPIRE", KEYS[1], string.format("%.0f", stale_ms))
end
return 1
