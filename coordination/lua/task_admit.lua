-- USES: _turns
-- USES: _rate
-- USES: _parking
-- Ask all gates of a task: it may run, and holds what it needs; or it is parked, where it may be.
--
-- KEYS: run, parked, waits, due, woken, gates, states..., seconds..., lines..., orders...
-- ARGV: id, token, nonce, generation, run_text, lease_ms, park, record, patience_us, channel, label, expires_us,
-- kinds..., amounts..., counts..., spans..., rests..., parts..., most..., policies..., fairs..., definitions...
-- RETURNS: {outcome, gate (counted from 1), wait_us, generation, now, text; if it runs, for each gate two numbers:
-- fence and end of a lease, or the receipt of a rate}
-- outcome: 1 run (after wait_us), 0 parked, 2 refused (and not to be parked), 3 a verdict (text), -1 it runs elsewhere
-- (and this one is parked until that ends), -2 stale: another delivery stands for it, -3 the line is full, -4 dropped.
-- token: of this attempt of the task; nonce: of this delivery. generation: of the parking it was woken from, or 0.
-- kinds: p permit (counts: how many; seconds: the queue), d debounce (spans: the pause, rests: the longest;
-- microseconds), c a claim (rests: 1 if it ends when the task starts; what another call has claimed is told at once, as
-- policies say, j: as a verdict), else a rate (see _rate.lua; seconds: until when it is blocked).
-- most: how many may wait in the line, -1: any number. expires_us: in what time it expires, or 0.
-- policies: what becomes of one more: r refused, o the oldest is dropped, n this one is, l all but the newest are.
-- park: 0 no, 1 yes, 2 yes: it has been admitted before (a retry, say), and is not counted.
--
-- One script, because permits that are free and tokens that are left must be taken together or not at all, and a task
-- that is refused must be in its line before the one it waits for can end. Permits are asked before tokens; nothing is
-- charged unless all agree.

local run, parked, waits, due, woken, gates = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, token, nonce, generation = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local lease_ms, patience_us, channel = ARGV[6], tonumber(ARGV[9]), ARGV[10]
local count = (#KEYS - 6) / 4
local rest_of_hold = "- " .. ARGV[11]
local now = turn_now()

local function given(column, i)
    return ARGV[12 + column * count + i]
end

local function number(column, i)
    return tonumber(given(column, i))
end

-- What it was handed, and does not need: it ends.
local function give_back()
    for i = 1, count do
        if given(0, i) == "p" then
            local state = KEYS[6 + i]
            local queue = KEYS[6 + count + i]
            local line = KEYS[6 + 2 * count + i]
            local turn = turn_open(state, queue, now, given(2, i), token)
            if turn.held then
                turn_end(state, turn)
                turn_settle(state, queue, turn)
                turn_close(state, queue, turn)
                if redis.call("ZCARD", line) > 0 then
                    redis.call("ZADD", due, turn_text(now), line)
                    redis.call("PUBLISH", channel, "due")
                end
            end
        end
    end
end

-- Of a permit that is kept for one that was woken and is on its way: the field that says so, of several the latest. It
-- may be long on its way, and its lease over before it comes; whoever has come back is here.
local function kept_for_another(state, line)
    local fields, latest, found = redis.call("HGETALL", state), 0, nil
    for i = 1, #fields, 2 do
        local fence, label = string.match(fields[i + 1], "^1 %d+ (%d+) %d+ %S+ (.*)$")
        local on_its_way = fields[i] == "h" .. line or string.sub(label or "", 1, 6) == "woken:"
        if fence and on_its_way and tonumber(fence) > latest then
            latest, found = tonumber(fence), fields[i]
        end
    end
    return found
end

local entry = park_look(waits, id)
local retries = tonumber(string.match(token, "%.(%d+)$"))
local came_back = generation > 0
local answer
if came_back and not (entry and entry.token == token and entry.generation == generation and entry.mode ~= "q") then
    return { -2, 0, 0, 0, now, "" }
elseif came_back and entry.verdict ~= "-" then
    park_forget(waits, parked, woken, due, id)
    give_back()
    return { 3, 0, 0, 0, now, entry.verdict }
elseif not came_back and entry then
    if tonumber(string.match(entry.token, "%.(%d+)$")) >= retries then -- itself, or a retry of it
        return { -2, 0, 0, 0, now, "" }
    end
end

local function note(line, amount, fair)
    local known = entry and entry.token == token and entry.generation or 0
    park_note(waits, id, {
        mode = "q", generation = known + 1, token = token, amount = amount, fair = fair, verdict = "-", line = line,
    })
    redis.call("HSET", parked, id, ARGV[8])
    redis.call("ZREM", woken, id)
    redis.call("ZREM", due, "=" .. id) -- when it was to be sent again
    if ARGV[12] ~= "0" then
        redis.call("ZADD", due, rate_text(now + ARGV[12]), "=" .. id)
    end
    return known + 1
end

local running = redis.call("GET", run)
if running and running ~= "ended" and string.sub(running, 1, #nonce + 1) ~= nonce .. " " then
    if ARGV[7] == "0" then
        return { 2, 0, redis.call("PTTL", run) * 1000, 0, now, "" }
    end
    local known = note("-", 1, "-")
    redis.call("ZADD", due, rate_text(now + redis.call("PTTL", run) * 1000 + 2000), "=" .. id)
    redis.call("PUBLISH", channel, "due")
    return { -1, 0, 0, known, now, "" }
end

-- Who may go.
local turns, limits, refusing, start, timed = {}, {}, 0, now, false
for i = 1, count do -- claims come first, before anything is changed
    local state = KEYS[6 + i]
    local queue = KEYS[6 + count + i]
    local line = KEYS[6 + 2 * count + i]
    if given(0, i) == "p" then
        local turn = turn_open(state, queue, now, given(2, i), token)
        turn_settle(state, queue, turn)
        turns[i] = turn
        if refusing == 0 and not turn.held then
            local free = turn.used < turn.capacity and turn.waiting == 0
            if not free and came_back then
                turn.promised = kept_for_another(state, line)
            end
            if not (free or turn.promised) or (not came_back and redis.call("ZCARD", line) > 0) then
                refusing = i
            end
        end
    elseif given(0, i) == "d" and refusing == 0 and not came_back and ARGV[7] ~= "2" then
        refusing = i
    elseif given(0, i) == "c" then
        local claimed = redis.call("GET", state)
        if claimed and claimed ~= id then
            if entry then
                park_forget(waits, parked, woken, due, id)
                give_back()
            end
            if given(7, i) == "j" then
                return { 3, i, 0, 0, now, "j" .. claimed }
            end
            return { given(7, i) == "r" and -3 or -4, i, 0, 0, now, "" }
        end
    end
end
for i = 1, count do
    local key = KEYS[6 + i]
    local second = KEYS[6 + count + i]
    local line = KEYS[6 + 2 * count + i]
    local kind = given(0, i)
    if kind ~= "p" and kind ~= "d" and kind ~= "c" and (refusing == 0 or timed) then
        local limit = rate_limit(key, now, kind, number(2, i), number(3, i), number(4, i), number(5, i))
        limits[i] = limit
        local earliest = math.max(limit.earliest(number(1, i)), tonumber(redis.call("GET", second) or 0))
        if earliest > start then
            start, refusing, timed = earliest, i, true
        end
        if not came_back and redis.call("ZCARD", line) > 0 then
            if refusing == 0 or not timed then
                refusing, timed = i, true
            end
            patience_us = -1
        end
    end
end
if timed and start - now <= patience_us then
    refusing = 0
end

if refusing == 0 then
    answer = { 1, 0, start - now, 0, now, "" }
    for i = 1, count do
        local state = KEYS[6 + i]
        local turn, limit = turns[i], limits[i]
        if turn and turn.held then
            local fence = string.match(turn.held, "^%d+ %d+ (%d+)")
            local ends = turn_text(now + lease_ms * 1000)
            local terms = "1 " .. lease_ms .. " " .. fence .. " " .. ends .. " "
            turn_change(state, turn, "h" .. token, terms .. rest_of_hold)
            answer[5 + 2 * i], answer[6 + 2 * i] = tonumber(fence), tonumber(ends)
        elseif turn then
            if turn.promised then
                redis.call("HDEL", state, turn.promised)
                turn.used = turn.used - 1
            end
            local fence, ends = turn_begin(state, turn, token, 1, lease_ms, 0, rest_of_hold)
            answer[5 + 2 * i], answer[6 + 2 * i] = tonumber(fence), tonumber(ends)
        elseif limit then
            answer[5 + 2 * i], answer[6 + 2 * i] = limit.charge(number(1, i), start, "")
        else
            if given(0, i) == "c" and number(4, i) == 1 then
                redis.call("DEL", state)
            end
            answer[5 + 2 * i], answer[6 + 2 * i] = 0, 0
        end
    end
    redis.call("SET", run, nonce .. " " .. ARGV[5], "PX", lease_ms)
    if entry then
        park_forget(waits, parked, woken, due, id)
    end
elseif ARGV[7] == "0" then
    local turn = turns[refusing]
    local wait_us = turn and math.max(0, turn.next_end - now) or start - now
    if given(0, refusing) == "d" then
        wait_us = number(3, refusing)
    end
    answer = { 2, refusing, wait_us, 0, now, "" }
else
    local state = KEYS[6 + refusing]
    local queue = KEYS[6 + count + refusing]
    local line = KEYS[6 + 2 * count + refusing]
    local order = KEYS[6 + 3 * count + refusing]
    local most, policy = number(6, refusing), given(7, refusing)
    local waiting = redis.call("ZCARD", line)
    -- One that has been admitted before has its place; but where the newest one is wanted, it is not that.
    local counted = not came_back and most >= 0 and waiting >= most and (policy == "l" or ARGV[7] == "1")
    if counted and (policy == "r" or policy == "n" or (policy == "l" and ARGV[7] == "2")) then
        answer = { policy == "r" and -3 or -4, refusing, 0, 0, now, "" }
    else
        if counted then
            local oldest, dropped = park_first(line, order, waits)
            if oldest then
                local since = given(0, refusing) == "d" and redis.call("HGET", order, "since")
                park_leave(line, order, oldest, dropped.fair, true)
                park_wake(waits, woken, oldest, dropped, "d", now)
                if since then
                    redis.call("HSET", order, "since", since)
                end
            end
        end
        for i = 1, count do -- what it holds it keeps while it waits for a moment, not for another permit
            local held_state = KEYS[6 + i]
            local held_queue = KEYS[6 + count + i]
            local turn = turns[i]
            if turn and turn.held and timed and start - now <= lease_ms * 1000 then
                local fence = string.match(turn.held, "^%d+ %d+ (%d+)")
                local ends = turn_text(start + lease_ms * 1000)
                local terms = "1 " .. lease_ms .. " " .. fence .. " " .. ends .. " "
                turn_change(held_state, turn, "h" .. token, terms .. rest_of_hold)
            elseif turn and turn.held then
                local held_line = KEYS[6 + 2 * count + i]
                turn_end(held_state, turn)
                turn_settle(held_state, held_queue, turn)
                if redis.call("ZCARD", held_line) > 0 then
                    redis.call("ZADD", due, turn_text(now), held_line)
                    redis.call("PUBLISH", channel, "due")
                end
            end
        end
        park_join(line, order, id, given(8, refusing), came_back)
        local known = note(line, given(1, refusing), given(8, refusing))
        redis.call("HSET", gates, line, given(9, refusing))
        local look_at = start
        if given(0, refusing) == "d" then
            redis.call("HSETNX", order, "since", rate_text(now))
            local since = tonumber(redis.call("HGET", order, "since"))
            look_at = math.min(now + number(3, refusing), since + number(4, refusing))
            redis.call("ZADD", due, rate_text(look_at), line)
        elseif timed then
            redis.call("ZADD", due, "LT", rate_text(look_at), line)
        else
            local turn = turns[refusing]
            local has_place = redis.call("HEXISTS", state, "w" .. line) == 1
            if not has_place and redis.call("HEXISTS", state, "h" .. line) == 0 then
                turn.waiting, turn.queued = turn.waiting + 1, true
                redis.call("ZADD", queue, redis.call("HINCRBY", state, "ticket", 1), line)
                turn_change(
                    state, turn, "w" .. line, "1 " .. lease_ms .. " " .. turn_text(now) .. " " .. channel .. " parked"
                )
            end
            look_at = turn.used < turn.capacity and now or turn.next_end + 2000
            redis.call("ZADD", due, "LT", rate_text(look_at), line)
        end
        if tonumber(redis.call("ZSCORE", due, line)) == look_at then
            redis.call("PUBLISH", channel, "due")
        end
        answer = { 0, refusing, math.max(0, start - now), known, now, "" }
    end
end
for i = 1, count do
    local state = KEYS[6 + i]
    local queue = KEYS[6 + count + i]
    if turns[i] then
        turn_close(state, queue, turns[i])
    end
end
return answer
