-- USES: _versions
-- The number of a namespace's last invalidation, raised first where asked.
--
-- KEYS: sequence
-- ARGV: rise, ttl_ms
-- RETURNS: 13 hexadecimal digits
--
-- One script, because a number that is not there is made from the server's clock.

sequence_of(KEYS[1], ARGV[2])
if ARGV[1] == "1" then
    redis.call("INCR", KEYS[1])
end
return sequence_of(KEYS[1], ARGV[2])
