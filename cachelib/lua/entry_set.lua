-- Store entries, and void the loads of them that are under way.
--
-- KEYS: entries..., leases...
-- ARGV: payloads..., ttls_ms...
-- RETURNS: how many entries were stored
--
-- One script, because a load that began before this SET must not be able to put its older value on top.

local count = #KEYS / 2
for i = 1, count do
    redis.call("SET", KEYS[i], ARGV[i], "PX", ARGV[count + i])
    redis.call("DEL", KEYS[count + i])
end
return count
