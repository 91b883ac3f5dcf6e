-- USES: _versions
-- Store entries, and void the loads of them that are under way.
--
-- KEYS: sequence, tags..., entries..., leases...
-- ARGV: tag_count, token, expected, stale, version_ttl_ms, versions, ttls_ms..., bodies...
-- expected: "*" store whatever is there; empty: only where there is nothing; else only over the entry with this token
-- versions: of the tags, where those are not among KEYS because they have slots of their own
-- RETURNS: 1 stored, all of them; 0 none
--
-- One script, because a load that began before this SET must not be able to put its older value on top, and because a
-- condition that is checked before the SET would be void at the SET.

local tag_count, expected, versions = tonumber(ARGV[1]), ARGV[3], ARGV[6]
local count = (#KEYS - 1 - tag_count) / 2
local first = 2 + tag_count

if expected ~= "*" then
    for i = first, first + count - 1 do
        local entry = redis.call("GET", KEYS[i])
        if (entry and string.sub(entry, 15, 30) or "") ~= expected then
            return 0
        end
    end
end
if tag_count > 0 then
    local sequence = sequence_of(KEYS[1], ARGV[5])
    for i = 2, 1 + tag_count do
        versions = versions .. version_of(KEYS[i], sequence, ARGV[2], ARGV[5])
    end
end

local head = head_of(ARGV[4], ARGV[2], versions)
for i = 1, count do
    redis.call("SET", KEYS[first + i - 1], head .. ARGV[6 + count + i], "PX", ARGV[6 + i])
    redis.call("DEL", KEYS[first + count + i - 1])
end
return 1
