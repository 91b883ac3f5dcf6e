-- USES: _versions
-- The versions of tags; one that has none gets one, and all are kept for long enough.
--
-- KEYS: tags...
-- ARGV: sequence, token, version_ttl_ms
-- sequence: the number of the last invalidation, for a version that is made now
-- RETURNS: {tag versions}
--
-- One script, because a version must live longer than the entries that carry it, from the moment it is read.

local versions = {}
for i, tag in ipairs(KEYS) do
    versions[i] = version_of(tag, ARGV[1], ARGV[2], ARGV[3])
end
return versions
