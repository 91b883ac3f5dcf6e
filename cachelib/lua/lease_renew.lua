-- Keep the lease of a load that is still running.
--
-- KEYS: lease
-- ARGV: token, lease_ms
-- RETURNS: 1 kept, 0 no longer ours (voided by an invalidation, or it ran out): it is not taken again
--
-- One script, because between the look and the PEXPIRE the lease could become another's.

if redis.call("HGET", KEYS[1], "token") ~= ARGV[1] then
    return 0
end
return redis.call("PEXPIRE", KEYS[1], ARGV[2])
