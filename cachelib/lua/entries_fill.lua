-- USES: _versions
-- End loads: store what they gave unless that has been invalidated, give the leases back, wake those who wait.
--
-- KEYS: sequence, tags..., entries..., leases..., wakes...
-- ARGV: tag_count, token, since, stale, version_ttl_ms, wake_ttl_ms, pause_ms, versions, kind, ttls_ms..., bodies...
-- since: the number of the last invalidation when the loads began
-- versions: of the tags, where those are not among KEYS because they have slots of their own
-- kind: 1 a value, x an exception that the loader raised
-- pause_ms: for so long, whoever has a stale value leaves this alone: the load failed; 0: no pause
-- bodies: empty when the load failed
-- RETURNS: {1 stored or 0 not stored (the load failed, or the key was invalidated or set while it ran), ...}
--
-- One script, because between a check of the lease and the SET an invalidation could slip in, and the value that it was
-- to remove would stay. Those who wait are woken in every case: after a refusal or a failure one of them loads. How
-- many wait stands in the lease; a voided lease has taken that with it, so then the list, which is this load's alone,
-- gets more than enough.

local tag_count, token, since, pause_ms = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[7])
local count = (#KEYS - 1 - tag_count) / 3
local versions, invalidated = ARGV[8], false

if tag_count > 0 then
    local sequence = sequence_of(KEYS[1], ARGV[5])
    for i = 2, 1 + tag_count do
        local version = version_of(KEYS[i], sequence, token, ARGV[5])
        invalidated = invalidated or string.sub(version, 1, 13) > since
        versions = versions .. version
    end
end
local head = head_of(ARGV[9], ARGV[4], token, versions)

local outcome = {}
for i = 1, count do
    local entry = 1 + tag_count + i
    local lease, wake = KEYS[entry + count], KEYS[entry + 2 * count]
    local stored, waiting = 0, 64
    local held = redis.call("HMGET", lease, "token", "waiting")
    if held[1] == token then
        local body = ARGV[9 + count + i]
        if body ~= "" and not invalidated then
            redis.call("SET", KEYS[entry], head .. body, "PX", ARGV[9 + i])
            stored = 1
        end
        if pause_ms > 0 then
            redis.call("HSET", lease, "token", "")
            redis.call("PEXPIRE", lease, pause_ms)
        else
            redis.call("DEL", lease)
        end
        waiting = math.min(tonumber(held[2]) or 64, 1000)
    end
    if waiting > 0 then
        for _ = 1, waiting do
            redis.call("RPUSH", wake, "1")
        end
        redis.call("PEXPIRE", wake, ARGV[6])
    end
    outcome[i] = stored
end
return outcome
