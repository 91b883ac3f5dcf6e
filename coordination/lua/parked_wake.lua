-- USES: _parking
-- Wake one parked task out of its turn: because it was revoked, or its own time has come.
--
-- KEYS: waits, woken, line, order, due, run
-- ARGV: id, verdict
-- RETURNS: {1 if it was woken or is awake, else 0; the line it waits in, or the empty text}
-- line: in which it was seen; if it waits in another one by now, nothing is done. verdict: x, it is revoked; =, its own
-- time has come: it has expired (x), or what it waited for alone is over (unless run still exists), or it was sent long
-- ago and has not come.
--
-- One script, because a task that leaves its line for a reason of its own may be woken by the line in the same moment.

local waits, woken, line, order, due, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, verdict = ARGV[1], ARGV[2]
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]
local entry = park_look(waits, id)
if not entry then
    redis.call("ZREM", due, "=" .. id)
    return { 0, "" }
end
local own_time = verdict == "="
if entry.mode ~= "q" then
    redis.call("ZREM", due, "=" .. id)
    if entry.mode == "s" and own_time then -- it was sent long ago, and has not come
        park_wake(waits, woken, id, entry, entry.verdict, now)
        entry.mode = "a"
        park_note(waits, id, entry)
    end
    return { 1, entry.line }
end
if own_time and entry.line == "-" then
    local left_ms = redis.call("PTTL", run)
    if left_ms > 0 then
        redis.call("ZADD", due, string.format("%.0f", now + left_ms * 1000 + 2000), "=" .. id)
        return { 0, "" }
    end
    verdict = "-"
elseif own_time then
    verdict = "x"
end
if entry.line ~= "-" then
    if entry.line ~= line then
        return { 0, entry.line }
    end
    park_leave(line, order, id, entry.fair, false)
    redis.call("ZADD", due, string.format("%.0f", now), line) -- who serves it tidies up
end
redis.call("ZREM", due, "=" .. id)
park_wake(waits, woken, id, entry, verdict, now)
return { 1, entry.line }
