-- USES: _versions
-- Read entries, each with what is left of its time, and the versions of tags.
--
-- KEYS: tags..., entries...
-- ARGV: tag_count
-- RETURNS: {tag versions, false where missing}, {entry or false, pttl_ms, entry or false, pttl_ms, ...}
--
-- One script, because an entry and the time left of another that took its place would tell a wrong age.

local versions, found = {}, {}
local tag_count = tonumber(ARGV[1])
for i = 1, tag_count do
    versions[i] = text_of(KEYS[i])
end
for i = tag_count + 1, #KEYS do
    found[#found + 1] = text_of(KEYS[i])
    found[#found + 1] = found[#found] and redis.call("PTTL", KEYS[i]) or -2
end
return {versions, found}
