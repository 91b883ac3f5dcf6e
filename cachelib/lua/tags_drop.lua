-- USES: _versions
-- Invalidate every entry that names one of the tags, and every load of one that is under way.
--
-- KEYS: sequence, tags...
-- ARGV: token, version_ttl_ms
-- RETURNS: how many tags had a version
--
-- One script, because the number must rise before a version carries it: a load that began with the old number must find
-- a higher one at its end.

local had = 0
sequence_of(KEYS[1], ARGV[2])
redis.call("INCR", KEYS[1])
local sequence = sequence_of(KEYS[1], ARGV[2])
for i = 2, #KEYS do
    had = had + redis.call("EXISTS", KEYS[i])
    redis.call("SET", KEYS[i], sequence .. string.sub(ARGV[1], -7), "PX", ARGV[2])
end
return had
