-- Read entries, each with what is left of its time.
--
-- KEYS: entries...
-- ARGV: none
-- RETURNS: {{entry or false, pttl_ms}, ...}
--
-- One script, because an entry and the time left of another that took its place would tell a wrong age.

local found = {}
for i, key in ipairs(KEYS) do
    found[i] = {redis.call("GET", key), redis.call("PTTL", key)}
end
return found
