-- End a load: store its value unless the lease was voided, give the lease back, wake those who wait.
--
-- KEYS: entry, lease, waiters, wake
-- ARGV: token, payload, ttl_ms, wake_ttl_ms
-- payload: empty when the load failed
-- RETURNS: 1 stored, 0 not stored (the load failed, or the key was invalidated or set while it ran)
--
-- One script, because between a check of the lease and the SET an invalidation could slip in, and the
-- value that it was to remove would stay. Those who wait are woken in every case: after a refusal or a
-- failure one of them loads.

local stored = 0
if redis.call("GET", KEYS[2]) == ARGV[1] then
    if ARGV[2] ~= "" then
        redis.call("SET", KEYS[1], ARGV[2], "PX", ARGV[3])
        stored = 1
    end
    redis.call("DEL", KEYS[2])
end

local waiting = math.min(tonumber(redis.call("GET", KEYS[3]) or 0), 1000)
if waiting > 0 then
    for _ = 1, waiting do
        redis.call("RPUSH", KEYS[4], "1")
    end
    redis.call("PEXPIRE", KEYS[4], ARGV[4])
    redis.call("DEL", KEYS[3])
end
return stored
