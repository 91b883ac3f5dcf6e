-- Refuse a caller for a while, or for longer than he is refused already.
--
-- KEYS: block
-- ARGV: for_us
-- RETURNS: for how long he is blocked now, in microseconds
--
-- One script, because of two that block at once the longer must win. The clock is the server's.

local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]
local till = math.max(now + tonumber(ARGV[1]), tonumber(redis.call("GET", KEYS[1]) or 0))
redis.call("SET", KEYS[1], string.format("%.0f", till), "PX", string.format("%.0f", math.ceil((till - now) / 1000)))
return till - now
