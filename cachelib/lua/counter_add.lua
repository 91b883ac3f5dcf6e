-- USES: _versions
-- Add to a whole number, and give it a TTL when this creates it; void the load of it that is under way.
--
-- KEYS: sequence, tags..., entry, lease
-- ARGV: tag_count, amount, ttl_ms, token, version_ttl_ms, versions
-- tags: that of the namespace alone
-- versions: of the tags, where those are not among KEYS because they have slots of their own
-- RETURNS: the new value, as text (a Lua number would lose digits beyond 2^53)
--
-- One script, because a client that dies between INCRBY and PEXPIRE would leave a counter for ever, and because the
-- number stands behind a head, which INCRBY does not know: it is taken off, and put back with the sum.

local tag_count, versions = tonumber(ARGV[1]), ARGV[6]
local key, lease = KEYS[2 + tag_count], KEYS[3 + tag_count]
if tag_count > 0 then
    versions = version_of(KEYS[2], sequence_of(KEYS[1], ARGV[5]), ARGV[4], ARGV[5])
end

local entry = text_of(key)
local left_ms = entry and redis.call("PTTL", key) or -1
if entry and string.sub(entry, 1, 1) == "\193" then
    local carried = string.sub(entry, 31, 30 + #versions)
    if tag_count == 0 and #carried == #versions and carried > versions then -- it was cleared, and counted on, since the caller asked for the version
        versions = carried
    elseif carried ~= versions or string.sub(entry, 2, 2) == "x" then -- of before it was cleared; or an exception
        entry, left_ms = false, -1
    end
end
local start, stale = "0", "0000000000"
if entry then
    stale = string.sub(entry, 5, 14)
    start = string.sub(entry, 1, 4) == "\193101" and string.sub(entry, 31 + #versions) or "no number"
    if not string.find(start, "^-?%d+$") then
        return redis.error_reply("ERR value is not an integer")
    end
end
redis.call("SET", key, start)
local sum = redis.pcall("INCRBY", key, ARGV[2])
if type(sum) == "table" and sum.err then
    redis.call("SET", key, entry, "PX", math.max(1, left_ms))
    return sum
end
sum = redis.call("GET", key)
redis.call("SET", key, head_of("1", stale, ARGV[4], versions) .. sum, "PX", left_ms > 0 and left_ms or ARGV[3])
redis.call("DEL", lease)
return sum
