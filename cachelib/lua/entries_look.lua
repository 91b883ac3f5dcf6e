-- USES: _versions
-- Read entries and the versions of tags; where asked, take the leases to load them in the same step.
--
-- KEYS: sequence, tags..., entries..., leases...
-- ARGV: tag_count, take, token, lease_ms, version_ttl_ms
-- take: 1 takes the lease of an entry that is gone; 2 and 3 take it whatever the entry is; 4 goes on with a lease that
--       was taken before; 1 and 3 are for those who wait when another holds it
-- RETURNS: {sequence, {tag versions, false where missing}, {entry or false, pttl_ms, lease, holder, ...}}
--          lease: 1 ours, 0 not asked for, -n another holds it for n more milliseconds; holder: its token
--
-- One script, because what guards a value must be read before its load begins: the number of the last invalidation,
-- and a version for each tag that has none. Whoever is going to wait is counted, so that the one who fills knows how
-- many to wake. A lease without a token is the pause after a load that failed: it keeps those away who have a stale
-- value to serve, and nobody else.

local tag_count, take, token, lease_ms = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local count = (#KEYS - 1 - tag_count) / 2
local found, taken = {}, false

for i = 2 + tag_count, 1 + tag_count + count do
    local entry = text_of(KEYS[i])
    local left_ms = entry and redis.call("PTTL", KEYS[i]) or -2
    local lease, holder = 0, ""
    if take ~= "1" or not entry then
        local key = KEYS[i + count]
        local held = redis.call("HGET", key, "token")
        if take == "4" then
            lease = held == token and redis.call("PEXPIRE", key, lease_ms) or -1
        elseif not held or (held == "" and take ~= "2") then
            redis.call("HSET", key, "token", token, "waiting", "0")
            redis.call("PEXPIRE", key, lease_ms)
            lease = 1
        else
            lease, holder = -math.max(1, redis.call("PTTL", key)), held
            if take ~= "2" then
                redis.call("HINCRBY", key, "waiting", 1)
            end
        end
    end
    taken = taken or lease == 1
    found[#found + 1] = entry
    found[#found + 1] = left_ms
    found[#found + 1] = lease
    found[#found + 1] = holder
end

local sequence, versions = "", {}
if taken and tag_count > 0 then
    sequence = sequence_of(KEYS[1], ARGV[5])
end
for i = 1, tag_count do
    versions[i] = taken and version_of(KEYS[1 + i], sequence, token, ARGV[5]) or text_of(KEYS[1 + i])
end
return {sequence, versions, found}
