-- Note a call as the newest of its key: one that is not due yet will not run any more.
--
-- KEYS: claims
-- ARGV: token, previous, wait_ms, max_wait_ms, kept_ms
-- RETURNS: {claim, in how many milliseconds it is due, 1 if the caller's previous claim is not valid any more else 0}
--
-- One script, because between the look at the newest claim and its removal it could become due and be taken, and both
-- calls would run. Claims are scored by when they are due, in microseconds by the server's clock, and begin with when
-- the first call of their series came. One that is due belongs to its owner and is left alone: otherwise calls that
-- come fast enough would put the run off for ever, whatever max_wait says. The member "-" keeps the key when all claims
-- are taken, so that an owner can tell "superseded" from "Redis has lost it". Claims that were due kept_ms ago are
-- those of processes that have died.

local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]
local wait, most, kept = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

local first = now
local newest = redis.call("ZREVRANGE", KEYS[1], 0, 0, "WITHSCORES")
if newest[1] and tonumber(newest[2]) > now then
    first = tonumber(string.match(newest[1], "^%d+"))
    redis.call("ZREM", KEYS[1], newest[1])
end

local due = now + wait * 1000
if most > 0 then
    due = math.max(now + 1, math.min(due, first + most * 1000))
end
local claim = string.format("%.0f", first) .. ":" .. ARGV[1]
redis.call("ZREMRANGEBYSCORE", KEYS[1], 1, string.format("%.0f", now - kept * 1000))
redis.call("ZADD", KEYS[1], 0, "-", string.format("%.0f", due), claim)
local due_in = math.ceil((due - now) / 1000)
redis.call("PEXPIRE", KEYS[1], string.format("%.0f", due_in + kept))

local gone = ARGV[2] ~= "" and not redis.call("ZSCORE", KEYS[1], ARGV[2])
return {claim, due_in, gone and 1 or 0}
