-- Parked tasks: which waits in which line, in what order, and which have been woken.
--
-- A line is a sorted set of the ids of those that wait at one gate; orders stand beside it. Between keys they go in
-- turns and within a key as they came (start-time fair queueing, Goyal et al. 1996): order is a hash with "v", the
-- score of the last one that left by being first; "f", how many came back to the front since the line was empty; and
-- for each key that waits "k<key>", the score of its last. waits is a hash with, per id: "mode generation token amount
-- fair verdict line". mode: q waits, w woken and to be sent, a the same once more, s sent. generation: how often it was
-- parked; a message that was sent for an earlier one is stale. verdict: what it is told when it comes, or "-": that it
-- may try. line is "-" for one that waits for a time alone. woken: a sorted set of those to be sent.

local function park_look(waits, id)
    local known = redis.call("HGET", waits, id)
    if not known then
        return nil
    end
    local mode, generation, token, amount, fair, verdict, line =
        string.match(known, "^(%a) (%d+) (%S+) (%d+) (%S+) (%S+) (.*)$")
    return {
        mode = mode, generation = tonumber(generation), token = token, amount = tonumber(amount), fair = fair,
        verdict = verdict, line = line,
    }
end

local function park_note(waits, id, entry)
    redis.call("HSET", waits, id, table.concat({
        entry.mode, entry.generation, entry.token, entry.amount, entry.fair, entry.verdict, entry.line,
    }, " "))
end

-- Puts one into a line: behind those of its key; or, where it has waited before, in front of all who have not.
local function park_join(line, order, id, fair, front)
    local known = redis.call("HMGET", order, "v", "f", "k" .. fair)
    local served, before, last = tonumber(known[1] or 0), tonumber(known[2] or 0), tonumber(known[3] or 0)
    local score
    if front then
        score = string.format("%.6f", served + (before + 1) / 1000000)
        redis.call("HSET", order, "f", before + 1)
    else
        score = string.format("%.0f", math.floor(math.max(served, last)) + 1)
        redis.call("HSET", order, "k" .. fair, score)
    end
    redis.call("ZADD", line, score, id)
end

-- Takes one out of a line.
local function park_leave(line, order, id, fair, was_first)
    local score = redis.call("ZSCORE", line, id)
    if not score then
        return
    end
    redis.call("ZREM", line, id)
    if redis.call("ZCARD", line) == 0 then
        redis.call("DEL", order)
        return
    end
    if fair and tonumber(redis.call("HGET", order, "k" .. fair) or 0) == tonumber(score) then
        redis.call("HDEL", order, "k" .. fair)
    end
    if was_first then
        redis.call("HSET", order, "v", score)
    end
end

-- The first of a line that still waits there, and what is known of it.
local function park_first(line, order, waits)
    while true do
        local id = redis.call("ZRANGE", line, 0, 0)[1]
        if not id then
            return nil
        end
        local entry = park_look(waits, id)
        if entry and entry.mode == "q" and entry.line == line then
            return id, entry
        end
        park_leave(line, order, id, nil, false)
    end
end

local function park_wake(waits, woken, id, entry, verdict, now)
    entry.mode, entry.verdict = "w", verdict
    park_note(waits, id, entry)
    redis.call("ZADD", woken, string.format("%.0f", now), id)
end

-- Tells those of a line, up to a score, what has been decided for them: so many at once. How many, and whether some are
-- left, for whom it is noted.
local function park_tell(waits, woken, line, order, verdict, bound, most, now)
    local some = redis.call("ZRANGEBYSCORE", line, "-inf", bound, "LIMIT", 0, most)
    for place, id in ipairs(some) do
        local entry = park_look(waits, id)
        if entry and entry.mode == "q" and entry.line == line then
            park_wake(waits, woken, id, entry, verdict, now + place)
        end
    end
    if #some > 0 then
        redis.call("ZREM", line, unpack(some))
    end
    local left = #some == most and redis.call("ZCOUNT", line, "-inf", bound) > 0
    if redis.call("ZCARD", line) == 0 then
        redis.call("DEL", order)
    elseif left then
        redis.call("HSET", order, "told", bound .. " " .. verdict)
    else
        redis.call("HDEL", order, "told")
    end
    return #some, left
end

local function park_forget(waits, parked, woken, due, id)
    redis.call("ZREM", due, "=" .. id)
    redis.call("HDEL", waits, id)
    redis.call("HDEL", parked, id)
    redis.call("ZREM", woken, id)
end
