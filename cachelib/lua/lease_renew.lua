-- Keep the lease of a load that is still running, and the versions of its tags for as long as its value will need them.
--
-- KEYS: lease, tags...
-- ARGV: token, lease_ms, tag_ttl_ms
-- RETURNS: 1 kept, 0 no longer ours (voided by an invalidation, or it ran out): it is not taken again
--
-- One script, because between the look and the PEXPIRE the lease could become another's.

if redis.call("HGET", KEYS[1], "token") ~= ARGV[1] then
    return 0
end
for i = 2, #KEYS do
    if redis.call("PTTL", KEYS[i]) < tonumber(ARGV[3]) then
        redis.call("PEXPIRE", KEYS[i], ARGV[3])
    end
end
return redis.call("PEXPIRE", KEYS[1], ARGV[2])
