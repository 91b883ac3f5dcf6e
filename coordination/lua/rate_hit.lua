-- USES: _rate
-- Ask for one call under several limits, and charge it to all of them or to none.
--
-- KEYS: block, states...
-- ARGV: mode, cost, amount, permit, kinds..., counts..., spans_us..., rests..., parts...
-- RETURNS: {refusing limit (counted from 1; -1: blocked; 0: none), wait_us, tightest limit, remaining, reset_us, cost
-- that was charged, and for each limit two numbers: its receipt; in mode peek what remains and reset_us}
--
-- mode: hit (now or not at all), take (as hit; and if more than the cost is left, up to amount), reserve (as soon as
-- all limits admit it, if that is within amount microseconds), peek (what hit would say; nothing is charged), owe (the
-- cost has been spent already: each limit is charged as soon as it admits it, whatever the others say).
-- block: until when the caller is blocked, in microseconds.
-- kinds: see _rate.lua; in capitals one that counts calls, whatever they cost.
--
-- One script, because between the reading of a state and its change another caller could read it too, and both would
-- take the last call. The clock is the server's. Nothing is written before every limit has agreed.

local mode, cost, amount, permit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]

local function price(kind)
    return kind == string.upper(kind) and 1 or cost
end

local count = #KEYS - 1
local limits, start, refusing = {}, now, 0
local blocked = tonumber(redis.call("GET", KEYS[1]) or 0)
if blocked > now then
    start, refusing = blocked, -1
end
for i = 1, count do
    local key = KEYS[i + 1]
    local kind = ARGV[4 + i]
    local limit = rate_limit(key, now, string.lower(kind), tonumber(ARGV[4 + count + i]), tonumber(ARGV[4 + 2 * count + i]),
        tonumber(ARGV[4 + 3 * count + i]), tonumber(ARGV[4 + 4 * count + i]))
    limits[i] = limit
    if mode ~= "owe" then
        local earliest = limit.earliest(price(kind))
        if earliest > start then
            start, refusing = earliest, i
        end
    end
end

if mode == "owe" then
    for i = 1, count do
        local kind, most, left = ARGV[4 + i], tonumber(ARGV[4 + count + i]), cost
        while left > 0 and kind ~= "c" and kind ~= string.upper(kind) do
            local part = math.min(left, most)
            local earliest = limits[i].earliest(part)
            if earliest - now > amount then
                break
            end
            limits[i].charge(part, earliest)
            left = left - part
        end
    end
    return {}
end

local wait, reply = start - now, {}
local tightest, remaining, reset = 0, 0, wait
if mode == "peek" then
    for i = 1, count do
        reply[5 + 2 * i], reply[6 + 2 * i] = limits[i].left()
    end
elseif wait == 0 or (mode == "reserve" and wait <= amount) then
    refusing = 0
    if mode == "take" then
        local most = amount
        for i = 1, count do
            most = math.min(most, (limits[i].left()))
        end
        cost = math.max(cost, most)
    end
    for i = 1, count do
        reply[5 + 2 * i], reply[6 + 2 * i] = limits[i].charge(price(ARGV[4 + i]), start, permit)
    end
end
for i = 1, count do
    if refusing == i or refusing == 0 then
        local left, until_paid = limits[i].left()
        if tightest == 0 or left < remaining then
            tightest, remaining, reset = i, left, until_paid
        end
    end
end
reply[1], reply[2], reply[3], reply[4], reply[5], reply[6] = refusing, wait, tightest, remaining, reset, cost
return reply
