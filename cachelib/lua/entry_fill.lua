-- End a load: store its value unless the lease was voided, give the lease back, wake those who wait.
--
-- KEYS: entry, lease, wake
-- ARGV: token, payload, ttl_ms, wake_ttl_ms
-- payload: empty when the load failed
-- RETURNS: 1 stored, 0 not stored (the load failed, or the key was invalidated or set while it ran)
--
-- One script, because between a check of the lease and the SET an invalidation could slip in, and the
-- value that it was to remove would stay. Those who wait are woken in every case: after a refusal or a
-- failure one of them loads. How many wait stands in the lease; a voided lease has taken that with it, so
-- then the list, which is this load's alone, gets more than enough.

local stored, waiting = 0, 64
local lease = redis.call("HMGET", KEYS[2], "token", "waiting")
if lease[1] == ARGV[1] then
    if ARGV[2] ~= "" then
        redis.call("SET", KEYS[1], ARGV[2], "PX", ARGV[3])
        stored = 1
    end
    redis.call("DEL", KEYS[2])
    waiting = math.min(tonumber(lease[2]), 1000)
end

if waiting > 0 then
    for _ = 1, waiting do
        redis.call("RPUSH", KEYS[3], "1")
    end
    redis.call("PEXPIRE", KEYS[3], ARGV[4])
end
return stored
