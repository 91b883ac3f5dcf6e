-- The versions of tags; one that has none gets one, and all are kept for long enough.
--
-- KEYS: tags...
-- ARGV: token, tag_ttl_ms
-- RETURNS: {tag versions}
--
-- One script, because a version must live longer than the entries that carry it, from the moment it is read.

local versions = {}
for i, tag in ipairs(KEYS) do
    local version = redis.call("GET", tag)
    if not version then
        version = ARGV[1]
        redis.call("SET", tag, version, "PX", ARGV[2])
    elseif redis.call("PTTL", tag) < tonumber(ARGV[2]) then
        redis.call("PEXPIRE", tag, ARGV[2])
    end
    versions[i] = version
end
return versions
