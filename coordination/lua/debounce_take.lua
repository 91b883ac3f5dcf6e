-- Take a call that is due, so that nobody else runs it.
--
-- KEYS: claims
-- ARGV: claim
-- RETURNS: 1 if it is the caller's to run, 0 if a newer call superseded it, -1 if Redis knows nothing of the key
--
-- One script, because a key that is made between the removal and the look would turn "lost" into "superseded", and the
-- call would be lost in silence.

if redis.call("ZREM", KEYS[1], ARGV[1]) == 1 then
    return 1
end
return redis.call("EXISTS", KEYS[1]) - 1
