-- Read an entry and the versions of tags; where asked, take the lease to load it in the same step.
--
-- KEYS: entry, lease, tags...
-- ARGV: take, token, lease_ms, tag_ttl_ms
-- take: 0 only reads; 1 takes the lease when the entry is gone; 2 and 3 take it whatever the entry is;
--       1 and 3 are for those who wait when another holds it
-- RETURNS: {entry or false, pttl_ms, lease, {tag versions, false where missing}, token of the lease's holder}
--          lease: 1 taken, 0 not asked for, -n another holds it for n more milliseconds
--
-- One script, because the versions that guard a value must be read before its load begins: a tag without
-- a version gets one here, under the lease, and an invalidation after this moment makes the load worthless.
-- Whoever is going to wait is counted, so that the one who fills knows how many to wake.

local entry = redis.call("GET", KEYS[1])
local left_ms = entry and redis.call("PTTL", KEYS[1]) or -2
local take, token, lease_ms, tag_ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local lease, holder = 0, ""
if take == "2" or take == "3" or (take == "1" and not entry) then
    if redis.call("EXISTS", KEYS[2]) == 0 then
        redis.call("HSET", KEYS[2], "token", token, "waiting", "0")
        redis.call("PEXPIRE", KEYS[2], lease_ms)
        lease = 1
    else
        lease = -math.max(1, redis.call("PTTL", KEYS[2]))
        holder = redis.call("HGET", KEYS[2], "token")
        if take ~= "2" then
            redis.call("HINCRBY", KEYS[2], "waiting", 1)
        end
    end
end

local versions = {}
for i = 3, #KEYS do
    local version = redis.call("GET", KEYS[i])
    if lease == 1 then
        if not version then
            version = token
            redis.call("SET", KEYS[i], version, "PX", tag_ttl_ms)
        elseif redis.call("PTTL", KEYS[i]) < tag_ttl_ms then
            redis.call("PEXPIRE", KEYS[i], tag_ttl_ms)
        end
    end
    versions[#versions + 1] = version
end

return {entry, left_ms, lease, versions, holder}
