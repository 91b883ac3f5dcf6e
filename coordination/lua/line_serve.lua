-- USES: _turns
-- USES: _rate
-- USES: _parking
-- Wake those of a line that may go now.
--
-- KEYS: line, order, state, second, wakes, waits, woken, gates, due
-- ARGV: kind, count, span, rest, part, lease_ms, lead_us, most, channel, lag_us, way_us
-- RETURNS: how many were woken
-- kind, count, span, rest, part, second: of the gate, as in task_admit.lua. wakes: the state of a rate as it will be when
-- all that were woken have come. lead_us: how much before its time one is woken, and
-- way_us the same for a rate, whose time is lost if nobody is there. most: no more than so many at once.
--
-- One script, because a permit is handed to the first of the line in the moment it is free, and because two who serve
-- one line must not wake two for one token.

local line, order, state, second, wakes = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local waits, woken, gates, due = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local kind, count, lease_ms, lead_us, most = ARGV[1], tonumber(ARGV[2]), ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local now = turn_now()
local done, look_at = 0, nil

local function wake(id, entry)
    park_leave(line, order, id, entry.fair, true)
    park_wake(waits, woken, id, entry, "-", now + done) -- so they are sent in this order
    done = done + 1
end

local told = redis.call("HGET", order, "told")
local left = false
if told then -- they were too many for task_end.lua
    local bound, verdict = string.match(told, "^(%S+) (%S+)$")
    done, left = park_tell(waits, woken, line, order, verdict, bound, most, now)
end

if left then
    look_at = now
elseif kind == "p" then
    -- The line itself stands in the queue for the first of those in it.
    local turn = turn_open(state, second, now, count, line)
    turn_settle(state, second, turn)
    while true do
        local id, entry = park_first(line, order, waits)
        local has_place = redis.call("ZSCORE", second, line)
        if not id then
            if #turn.changes > 0 then
                redis.call("HSET", state, unpack(turn.changes))
                turn.changes = {}
            end
            if turn.held then
                turn_end(state, turn)
            end
            if has_place then
                redis.call("ZREM", second, line)
                redis.call("HDEL", state, "w" .. line)
                turn.waiting = turn.waiting - 1
            end
            turn_settle(state, second, turn)
            break
        elseif done >= most then
            look_at = now
            break
        elseif turn.held then
            if #turn.changes > 0 then
                redis.call("HSET", state, unpack(turn.changes))
                turn.changes = {}
            end
            local fence = string.match(turn.held, "^%d+ %d+ (%d+)")
            redis.call("HDEL", state, "h" .. line)
            turn.held = nil
            turn_change(
                state, turn, "h" .. entry.token,
                "1 " .. lease_ms .. " " .. fence .. " " .. turn_text(now + lease_ms * 1000) .. " - woken:" .. id
            )
            wake(id, entry)
        elseif turn.used < turn.capacity and turn.waiting == 0 then
            turn_begin(state, turn, entry.token, 1, lease_ms, 0, "- woken:" .. id)
            wake(id, entry)
        else
            if not has_place then
                turn.waiting, turn.queued = turn.waiting + 1, true
                redis.call("ZADD", second, redis.call("HINCRBY", state, "ticket", 1), line)
                turn_change(
                    state, turn, "w" .. line, "1 " .. lease_ms .. " " .. turn_text(now) .. " " .. ARGV[9] .. " parked"
                )
                turn_settle(state, second, turn)
            end
            if not turn.held then
                look_at = math.max(turn.next_end, now + 50000) + 2000
                break
            end
        end
    end
    turn_close(state, second, turn)
elseif kind == "d" then
    local at = tonumber(redis.call("ZSCORE", due, line) or 0)
    local id, entry = park_first(line, order, waits)
    if id and at <= now + lead_us then
        wake(id, entry)
    elseif id then
        look_at = at
    end
else
    local span, rest, part = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
    local limit = rate_limit(state, now, kind, count, span, rest, part)
    local coming = rate_limit(wakes, now, kind, count, span, rest, part)
    local blocked, lag_us, way_us = tonumber(redis.call("GET", second) or 0), tonumber(ARGV[10]), tonumber(ARGV[11])
    while true do
        local id, entry = park_first(line, order, waits)
        if not id then
            break
        end
        local amount = math.min(entry.amount, count)
        local earliest, started = math.max(coming.earliest(amount), blocked), limit.earliest(amount)
        if started > earliest + lag_us then
            earliest = started
        end
        if earliest > now + way_us or done >= most then
            look_at = done >= most and now or earliest - way_us + lead_us
            break
        end
        coming.charge(amount, math.max(earliest, now), "")
        wake(id, entry)
    end
end

if look_at then
    redis.call("ZADD", due, rate_text(look_at), line)
else
    redis.call("ZREM", due, line)
    redis.call("HDEL", gates, line)
end
return done
