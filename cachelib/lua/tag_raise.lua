-- USES: _versions
-- Invalidate every entry that names a tag, by a version that carries the number of this invalidation.
--
-- KEYS: tag
-- ARGV: version, ttl_ms
-- RETURNS: 1 it had a version, 0 it had none
--
-- One script, because of two invalidations at once the one with the lower number may come later, and a version must never
-- go back: a load that began between them would take its old value for a new one.

local had = text_of(KEYS[1])
if not had or string.sub(had, 1, 13) < string.sub(ARGV[1], 1, 13) then
    redis.call("SET", KEYS[1], ARGV[1], "PX", ARGV[2])
end
return had and 1 or 0
