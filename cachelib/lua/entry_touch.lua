-- USES: _versions
-- Give an entry a new time to live, and the versions of its tags too; return it as it was.
--
-- KEYS: tags..., entry
-- ARGV: tag_count, ttl_ms, version_ttl_ms, versions
-- versions: of the tags, where those are not among KEYS because they have slots of their own, and were given the time
-- RETURNS: {entry or false, pttl_ms before, {tag versions, false where missing}, 1 if it was given the time}
--
-- One script, because an entry must not outlive the versions that it carries. One whose tags were not named is left as
-- it was: who called knows the tags now, and calls again. So is one that is stale, invalidated or an exception: touching
-- must not bring it back. The stale window that it was stored with stays.

local tag_count = tonumber(ARGV[1])
local key = KEYS[1 + tag_count]
local entry = text_of(key)
if not entry then
    return {false, -2, {}, 0}
end
local left_ms, versions, touched, current = redis.call("PTTL", key), {}, 0, ARGV[4]
local stale_ms = tonumber(string.sub(entry, 5, 14), 16) or 0
for i = 1, tag_count do
    versions[i] = text_of(KEYS[i])
    current = current .. (versions[i] or "")
end
local carried = string.sub(entry, 31, 30 + 20 * (tonumber(string.sub(entry, 3, 4), 16) or 0))
if string.sub(entry, 1, 2) == "\1931" and carried == current and (stale_ms == 0 or left_ms > stale_ms) then
    touched = 1
    for i = 1, tag_count do
        if redis.call("PTTL", KEYS[i]) < tonumber(ARGV[3]) + stale_ms then
            redis.call("PEXPIRE", KEYS[i], string.format("%.0f", tonumber(ARGV[3]) + stale_ms))
        end
    end
    redis.call("PEXPIRE", key, string.format("%.0f", tonumber(ARGV[2]) + stale_ms))
end
return {entry, left_ms, versions, touched}
