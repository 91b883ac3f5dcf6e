-- USES: _turns
-- Tell who holds and who waits. Changes nothing.
--
-- KEYS: state, queue
-- ARGV: most
-- RETURNS: {now, fields and values of the state, tokens of those who wait}
--
-- One script, because two reads would show two moments.

return {turn_now(), redis.call("HGETALL", KEYS[1]), redis.call("ZRANGE", KEYS[2], 0, ARGV[1] - 1)}
