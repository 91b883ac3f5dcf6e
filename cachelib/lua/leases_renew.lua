-- Keep the leases of loads that are still running.
--
-- KEYS: leases...
-- ARGV: token, lease_ms
-- RETURNS: how many are still ours; others were voided by an invalidation, or ran out, and are not taken again
--
-- One script, because between the look and the PEXPIRE a lease could become another's.

local kept = 0
for _, lease in ipairs(KEYS) do
    if redis.call("HGET", lease, "token") == ARGV[1] then
        kept = kept + redis.call("PEXPIRE", lease, ARGV[2])
    end
end
return kept
