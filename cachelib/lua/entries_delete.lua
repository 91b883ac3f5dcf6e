-- Delete entries, and void the loads of them that are under way.
--
-- KEYS: entries..., leases...
-- ARGV: none
-- RETURNS: how many entries there were
--
-- One script, because a load whose lease outlives the entry could put the deleted value back.

local count = #KEYS / 2
local deleted = 0
for i = 1, count do
    redis.call("DEL", KEYS[count + i])
    deleted = deleted + redis.call("UNLINK", KEYS[i])
end
return deleted
