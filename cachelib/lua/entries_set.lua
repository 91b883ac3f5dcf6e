-- USES: _versions
-- Store entries, and void the loads of them that are under way.
--
-- KEYS: sequence, olds..., tags..., entries..., leases...
-- ARGV: old_count, tag_count, carried, token, expected, stale, version_ttl_ms, versions, ttls_ms..., bodies...
-- olds: the tags of the entry that is expected; none have been invalidated if their versions are still those carried
-- expected: "*" store whatever is there; empty: only where there is nothing (an exception is nothing); else only over the entry with this token
-- versions: of the tags, where those are not among KEYS because they have slots of their own
-- RETURNS: 1 stored, all of them; 0 none
--
-- One script, because a load that began before this SET must not be able to put its older value on top, and because a
-- condition that is checked before the SET would be void at the SET.

local old_count, tag_count, expected, versions = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[5], ARGV[8]
local count = (#KEYS - 1 - old_count - tag_count) / 2
local first = 2 + old_count + tag_count

if expected ~= "*" then
    for i = first, first + count - 1 do
        local entry = text_of(KEYS[i])
        local nothing = not entry or (expected == "" and string.sub(entry, 2, 2) == "x")
        if (nothing and "" or string.sub(entry, 15, 30)) ~= expected then
            return 0
        end
    end
    local current = ""
    for i = 2, 1 + old_count do
        current = current .. (text_of(KEYS[i]) or "")
    end
    if current ~= ARGV[3] then
        return 0
    end
end
if tag_count > 0 then
    local sequence = sequence_of(KEYS[1], ARGV[7])
    for i = 2 + old_count, 1 + old_count + tag_count do
        versions = versions .. version_of(KEYS[i], sequence, ARGV[4], ARGV[7])
    end
end

local head = head_of("1", ARGV[6], ARGV[4], versions)
for i = 1, count do
    redis.call("SET", KEYS[first + i - 1], head .. ARGV[8 + count + i], "PX", ARGV[8 + i])
    redis.call("DEL", KEYS[first + count + i - 1])
end
return 1
