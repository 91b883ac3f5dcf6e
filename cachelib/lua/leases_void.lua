-- Give back leases that were taken for nobody.
--
-- KEYS: leases...
-- ARGV: token
-- RETURNS: how many there were
--
-- One script, because between the look and the DEL a lease could become another's.

local voided = 0
for _, lease in ipairs(KEYS) do
    if redis.call("HGET", lease, "token") == ARGV[1] then
        voided = voided + redis.call("DEL", lease)
    end
end
return voided
