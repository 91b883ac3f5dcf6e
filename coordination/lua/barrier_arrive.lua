-- Arrive at a barrier, or tell that one still waits there; when all parties are there, let them pass.
--
-- KEYS: state, arrived, opened
-- ARGV: token, parties, lease_ms, channel
-- RETURNS: {1, place} when it may pass: how many of those that pass came before it; {0, 1 if it was there before, else 0}
-- when it waits; {-1, parties} when those who wait already wait for another number
-- channel: on which its process is told that the barrier has opened.
--
-- One script, because between the count of those who are there and the opening one of them could leave or die, and the
-- others would pass without it. Who does not listen any more, or has not been heard of for its lease, does not count.
-- Who passed stays known for two leases, so a reply or a message that was lost is asked for again.
-- state: "parties", "ticket", and for each token that waits "end_of_lease_ms lease_ms channel". opened: the score is
-- 16384 times the second until which it is kept, plus the place; a double holds that exactly.

local state, arrived, opened = KEYS[1], KEYS[2], KEYS[3]
local token, parties, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call("TIME")
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
local PLACES = 16384

-- How many of each thousand channels' processes listen; one question for all tokens of one process.
local function listened(channels)
    local listening, batch = {}, {}
    for position, name in ipairs(channels) do
        batch[#batch + 1] = name
        if #batch == 1000 or position == #channels then
            local counts = redis.call("PUBSUB", "NUMSUB", unpack(batch))
            for i = 1, #counts, 2 do
                listening[counts[i]] = tonumber(counts[i + 1]) > 0
            end
            batch = {}
        end
    end
    return listening
end

-- Forgets those who are dead.
local function bury()
    local channels, seen, waiting = {}, {}, {}
    for _, other in ipairs(redis.call("ZRANGE", arrived, 0, -1)) do
        local ends, its = string.match(redis.call("HGET", state, "w" .. other) or "", "^(%d+) %d+ (%S+)$")
        waiting[other] = { ends = tonumber(ends or 0), channel = its or "" }
        if its and not seen[its] then
            seen[its] = true
            channels[#channels + 1] = its
        end
    end
    local listening = listened(channels)
    for other, its in pairs(waiting) do
        if other ~= token and (its.ends <= now_ms or not listening[its.channel]) then
            redis.call("ZREM", arrived, other)
            redis.call("HDEL", state, "w" .. other)
        end
    end
end

local passed = redis.call("ZSCORE", opened, token)
if passed then
    return { 1, tonumber(passed) % PLACES }
end

local known = redis.call("ZSCORE", arrived, token) and 1 or 0
if redis.call("EXISTS", state) == 0 then -- evicted, perhaps in part
    redis.call("DEL", arrived)
    known = 0
end
local wanted = tonumber(redis.call("HGET", state, "parties") or parties)
if wanted ~= parties then
    bury()
    if redis.call("ZCARD", arrived) > 0 then
        return { -1, wanted }
    end
end
if known == 0 then
    redis.call("ZADD", arrived, redis.call("HINCRBY", state, "ticket", 1), token)
end
local rest = string.format("%.0f", now_ms + lease_ms) .. " " .. lease_ms .. " " .. ARGV[4]
redis.call("HSET", state, "parties", parties, "w" .. token, rest)

if redis.call("ZCARD", arrived) >= parties then
    bury()
    local all = redis.call("ZRANGE", arrived, 0, -1)
    if #all >= parties then
        local own
        redis.call("ZREMRANGEBYSCORE", opened, "-inf", string.format("%.0f", now_s * PLACES))
        for position, other in ipairs(all) do
            local its_ms, its = string.match(redis.call("HGET", state, "w" .. other), "^%d+ (%d+) (%S+)$")
            local kept_s = now_s + math.ceil(its_ms / 500) + 1
            redis.call("ZADD", opened, string.format("%.0f", kept_s * PLACES + position - 1), other)
            if other == token then
                own = position - 1
            else
                redis.call("PUBLISH", its, other .. " " .. position .. " 0")
            end
        end
        redis.call("DEL", state, arrived)
        redis.call("PEXPIRE", opened, 7260000) -- two of the longest leases, and a minute
        return { 1, own }
    end
end
redis.call("PEXPIRE", state, 7200000)
redis.call("PEXPIRE", arrived, 7200000)
return { 0, known }
