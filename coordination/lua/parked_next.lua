-- What is to be done for those that are parked: lines to serve, and tasks to send.
--
-- KEYS: due, woken, waits, parked, gates
-- ARGV: lead_us, most
-- RETURNS: {now, when the next line or task is due (0: none), lines that are due and the definitions of their gates in
-- turns, tasks that are due, of each task to be sent its id, generation, token, verdict, mode and record in turns}
--
-- One script, because a task and what is written of it must be read together: in between it might have been revoked, or
-- parked anew.

local due, woken, waits, parked, gates = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local most = tonumber(ARGV[2])
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]
local horizon = string.format("%.0f", now + ARGV[1])

local lines, tasks, sends = {}, {}, {}
for _, member in ipairs(redis.call("ZRANGEBYSCORE", due, "-inf", horizon, "LIMIT", 0, most)) do
    if string.sub(member, 1, 1) == "=" then
        tasks[#tasks + 1] = string.sub(member, 2)
    else
        lines[#lines + 1] = member
        lines[#lines + 1] = redis.call("HGET", gates, member) or ""
    end
end
for _, id in ipairs(redis.call("ZRANGE", woken, 0, most - 1)) do
    local known = redis.call("HGET", waits, id)
    local record = redis.call("HGET", parked, id)
    if known and record then
        local mode, generation, token, verdict = string.match(known, "^(%a) (%d+) (%S+) %d+ %S+ (%S+) ")
        for _, part in ipairs({ id, generation, token, verdict, mode, record }) do
            sends[#sends + 1] = part
        end
    else
        redis.call("ZREM", woken, id)
    end
end
local following = redis.call("ZRANGEBYSCORE", due, "(" .. horizon, "+inf", "WITHSCORES", "LIMIT", 0, 1)[2]
return { now, tonumber(following or 0), lines, tasks, sends }
