-- USES: _turns
-- USES: _parking
-- A task has ended, or its process has: give back what it holds, and wake those that wait for its result.
--
-- KEYS: run, parked, waits, due, woken, gates, states..., queues..., lines..., orders...
-- ARGV: id, token, nonce, crashed, channel, known_ms, rest, next_token, next_ms, most, capacities..., verdicts...,
-- forgets..., keeps...
-- RETURNS: 1 if it was known to run, else 0
-- crashed: 1 when its process died: then another delivery of it that waits for its end may run; else that one is of no
-- more use. known_ms: how long it is to be known that it has ended. rest: what stands at run for so long instead, while
-- Celery still has to keep its result and send what follows: it has not ended before. verdicts: what all that wait for a permit are told,
-- or "-": then the permit is handed on to the next one. most: no more than so many are told here; the verdict is then
-- left at their line, and line_serve.lua tells the rest. forgets: 1 where nothing need be known of a permit that nobody
-- has or wants. keeps: 1 where the permit is for the next attempt (next_token), which comes within next_ms; if it has
-- come already, and waits, it is the next one.
--
-- One script, because what is given back is handed on in the same moment, and because a delivery that finds the run gone
-- would run a task that has ended. Repeated, it does nothing.

local run, parked, waits, due, woken, gates = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, token, nonce, crashed, channel = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == "1", ARGV[5]
local rest, next_token, next_ms, most = ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
local count = (#KEYS - 6) / 4
local now = turn_now()
local running = redis.call("GET", run)
local mine = running and string.sub(running, 1, #nonce + 1) == nonce .. " "
if not mine and (running or crashed) then
    return 0 -- another delivery runs: what the token holds is its own
end
if tonumber(ARGV[6]) > 0 and not crashed then
    redis.call("SET", run, rest == "" and "ended" or nonce .. " " .. rest, "PX", ARGV[6])
else
    redis.call("DEL", run)
end

-- Leaves a permit to the next attempt. That may have been refused already: then it goes to the front.
local function keep(state, line, order, turn)
    local entry = park_look(waits, id)
    local units, fence, label = string.match(turn.held, "^(%d+) %d+ (%d+) %d+ (.*)$")
    turn_end(state, turn)
    if entry and entry.token == next_token then
        if entry.mode == "q" and entry.line == line then
            park_leave(line, order, id, entry.fair, false)
            park_join(line, order, id, entry.fair, true)
        end
    else
        local ends = now + next_ms * 1000
        local terms = units .. " " .. next_ms .. " " .. fence .. " " .. turn_text(ends) .. " " .. label
        redis.call("HSET", state, "h" .. next_token, terms) -- now: what is in use may be counted anew below
        turn.next_end = turn.used == 0 and ends or math.min(turn.next_end, ends)
        turn.used = turn.used + tonumber(units)
    end
end

local told = false
for i = 1, count do
    local state = KEYS[6 + i]
    local queue = KEYS[6 + count + i]
    local line = KEYS[6 + 2 * count + i]
    local order = KEYS[6 + 3 * count + i]
    local turn = turn_open(state, queue, now, ARGV[10 + i], token)
    if turn.held and ARGV[10 + 3 * count + i] == "1" then
        keep(state, line, order, turn)
    elseif turn.held then
        turn_end(state, turn)
    end
    local verdict = ARGV[10 + count + i]
    if verdict ~= "-" and not crashed then
        local last = redis.call("ZRANGE", line, -1, -1, "WITHSCORES")[2]
        if last and park_tell(waits, woken, line, order, verdict, last, most, now) > 0 then
            told = true
        end
        if redis.call("ZCARD", line) == 0 then
            redis.call("HDEL", gates, line)
            redis.call("ZREM", due, line)
        end
        if redis.call("ZREM", queue, line) == 1 then
            turn.waiting = turn.waiting - 1
            redis.call("HDEL", state, "w" .. line)
        end
    end
    turn_settle(state, queue, turn)
    if ARGV[10 + 2 * count + i] == "1" and turn.used == 0 and turn.waiting == 0 then
        redis.call("DEL", state)
    else
        turn_close(state, queue, turn)
    end
    if redis.call("ZCARD", line) > 0 then
        redis.call("ZADD", due, turn_text(now), line)
        told = true
    end
end

local twin = park_look(waits, id)
if rest == "" and twin and twin.token == token and twin.line == "-" and twin.mode == "q" then
    redis.call("ZREM", due, "=" .. id)
    if crashed then
        park_wake(waits, woken, id, twin, "-", now)
        told = true
    else
        park_forget(waits, parked, woken, due, id)
    end
end
if told then
    redis.call("PUBLISH", channel, "woken")
end
return mine and 1 or 0
