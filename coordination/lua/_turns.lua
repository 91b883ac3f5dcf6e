-- Taking turns at something of which there are so many units: who holds how many, who waits, in which order.
--
-- A lock is one unit; a semaphore has several; of a lock for readers and writers a reader takes one and a writer all.
-- state: a hash with the last fence, the units in use, a time before which no lease ends, how many wait, the last ticket,
-- since when its TTL runs, and one field per token: "h<token>" of who holds: "units lease_ms fence ends channel label", and "w<token>" of who
-- waits: "units lease_ms since channel label". queue: the tokens of those who wait, by ticket. Times are whole
-- microseconds of the server's clock.
-- A hold is granted by whoever makes room for it, in the same script: it is never free while somebody waits, so nobody
-- can come in between. Who waits is told on the channel of its process. When nobody listens to that on this server, it
-- is dead, and the next one is granted in its place; it is asked before anything is said, because a replica or another
-- node of a Cluster hands messages on too, and a process that listens there must not take what it was not granted.
-- Commands cost more than anything else here: what can stand in the one hash stands there, and is read and written once.

-- Whole microseconds as text: Lua's own way keeps 14 digits, "%.0f" takes four times as long as two halves.
local function turn_text(number)
    return string.format("%d%06d", math.floor(number / 1000000), number % 1000000)
end

local function turn_now()
    local time = redis.call("TIME")
    return time[1] * 1000000 + time[2]
end

-- What there is, and what a token holds. Without the hash the queue means nothing (one of the two was evicted).
local function turn_open(state, queue, now, capacity, token)
    local known = redis.call("HMGET", state, "fence", "used", "next_end", "waiting", "kept", "capacity", "h" .. token)
    if not known[1] then
        redis.call("DEL", queue)
    end
    return {
        now = now,
        fence = tonumber(known[1] or 0),
        used = tonumber(known[2] or 0),
        next_end = tonumber(known[3] or 0),
        waiting = tonumber(known[4] or 0),
        kept = tonumber(known[5] or 0),
        capacity = tonumber(known[6] or capacity),
        resized = known[6],
        token = token,
        held = known[7],
        changes = {},
    }
end

-- Notes a field that changes. Written at the end, in few commands: Lua cannot hand on any number of values at once.
local function turn_change(state, turn, field, text)
    if #turn.changes >= 200 then
        redis.call("HSET", state, unpack(turn.changes))
        turn.changes = {}
    end
    turn.changes[#turn.changes + 1] = field
    turn.changes[#turn.changes + 1] = text
    if field == "h" .. turn.token then
        turn.held = text
    end
end

-- Ends a hold. Returns whether its lease had not run out.
local function turn_end(state, turn)
    local units, ends = string.match(turn.held, "^(%d+) %d+ %d+ (%d+)")
    redis.call("HDEL", state, "h" .. turn.token)
    turn.used = math.max(0, turn.used - tonumber(units))
    turn.held = nil
    return tonumber(ends) > turn.now
end

-- Begins a hold. Returns its fence and the end of its lease, as text.
local function turn_begin(state, turn, token, units, lease_ms, least_fence, rest)
    turn.fence = math.max(turn.fence + 1, turn.now, least_fence)
    local ends = turn.now + lease_ms * 1000
    turn.next_end = turn.used == 0 and ends or math.min(turn.next_end, ends)
    turn.used = turn.used + units
    local fence, ends_text = turn_text(turn.fence), turn_text(ends)
    turn_change(state, turn, "h" .. token, units .. " " .. lease_ms .. " " .. fence .. " " .. ends_text .. " " .. rest)
    return fence, ends_text
end

-- Ends the holds whose leases have run out, or all; counts anew what is in use. Returns how many were ended.
local function turn_reclaim(state, turn, all)
    if turn.used == 0 or (turn.next_end > turn.now and not all) then
        return 0
    end
    local fields, ended, used, next_end = redis.call("HGETALL", state), 0, 0, math.huge
    for i = 1, #fields, 2 do
        if string.sub(fields[i], 1, 1) == "h" then
            local units, ends = string.match(fields[i + 1], "^(%d+) %d+ %d+ (%d+)")
            if all or tonumber(ends) <= turn.now then
                redis.call("HDEL", state, fields[i])
                ended = ended + 1
                if fields[i] == "h" .. turn.token then
                    turn.held = nil
                end
            else
                used, next_end = used + tonumber(units), math.min(next_end, tonumber(ends))
            end
        end
    end
    turn.used, turn.next_end = used, used > 0 and next_end or 0
    return ended
end

-- Ends what has run out, and grants what is free to those who wait, in their order: as often as there is somebody to
-- serve, for who is left would wait for nothing.
local function turn_settle(state, queue, turn)
    turn_reclaim(state, turn, false)
    while turn.waiting > 0 and turn.used < turn.capacity do
        local token = redis.call("ZRANGE", queue, 0, 0)[1]
        if not token then -- evicted
            turn.waiting = 0
            return
        end
        local waiting = redis.call("HGET", state, "w" .. token) or ""
        local units, lease_ms, rest, channel = string.match(waiting, "^(%d+) (%d+) %d+ ((%S+) .*)$")
        units = tonumber(units or 0)
        if units <= turn.capacity and turn.used + units > turn.capacity then
            return
        end
        redis.call("ZREM", queue, token)
        redis.call("HDEL", state, "w" .. token)
        turn.waiting = turn.waiting - 1
        if units > turn.capacity then -- there are fewer by now: it looks again, and is told so
            redis.call("PUBLISH", channel, token .. " 0 0")
        elseif units > 0 and redis.call("PUBSUB", "NUMSUB", channel)[2] > 0 then
            local fence, ends = turn_begin(state, turn, token, units, lease_ms, 0, rest)
            redis.call("PUBLISH", channel, token .. " " .. fence .. " " .. ends)
        end
    end
end

-- Writes down what has changed, to be kept for as long as it can matter: for two hours, or a week where a number of
-- permits was set. That is renewed every half an hour, and no lease is longer than an hour.
local function turn_close(state, queue, turn)
    local renew = turn.now - turn.kept > 1800000000
    if renew then
        turn_change(state, turn, "kept", turn.now)
    end
    redis.call(
        "HSET", state, "fence", turn.fence, "used", turn.used, "next_end", turn.next_end, "waiting", turn.waiting,
        unpack(turn.changes)
    )
    local kept_ms = turn.resized and 604800000 or 7200000
    if renew then
        redis.call("PEXPIRE", state, kept_ms)
    end
    if turn.waiting > 0 and (renew or turn.queued) then
        redis.call("PEXPIRE", queue, kept_ms)
    end
end
