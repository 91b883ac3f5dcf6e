-- USES: _versions
-- Take an entry out: return it and delete it, and void the load that is under way.
--
-- KEYS: tags..., entry, lease
-- ARGV: tag_count
-- RETURNS: {entry or false, pttl_ms, {tag versions, false where missing}}
--
-- One script, because of two who take it one must come too late.

local tag_count, versions = tonumber(ARGV[1]), {}
local key = KEYS[tag_count + 1]
for i = 1, tag_count do
    versions[i] = text_of(KEYS[i])
end
local entry = text_of(key)
local left_ms = entry and redis.call("PTTL", key) or -2
redis.call("UNLINK", key)
redis.call("DEL", KEYS[tag_count + 2])
return {entry, left_ms, versions}
