-- Decide one call under several limits (GCRA), and charge it to all of them or to none.
--
-- KEYS: states...
-- ARGV: cost, intervals_us..., bursts...
-- RETURNS: {refusing limit, counted from 1, or 0 when admitted, wait_us, remaining, reset_us}, all as text
--
-- One script, because between the reading of a state and its change another caller could read it too, and
-- both would take the last call. The clock is the server's. Whole microseconds stay below 2^53, so Lua
-- computes them exactly; "%.0f" keeps all digits when they become text. Nothing is written before every limit
-- has agreed.

local cost, count = tonumber(ARGV[1]), #KEYS
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]

local tats, refusing, wait, remaining, reset = {}, 0, 0, nil, 0
for i = 1, count do
    local interval, burst = tonumber(ARGV[1 + i]), tonumber(ARGV[1 + count + i])
    local tat = math.max(tonumber(redis.call("GET", KEYS[i]) or 0), now) + cost * interval
    tats[i] = tat
    local ahead = tat - now
    local this_wait = math.max(0, ahead - burst * interval)
    if this_wait > wait then
        refusing, wait = i, this_wait
    end
    remaining = math.min(remaining or math.huge, math.floor((burst * interval - ahead) / interval))
    reset = math.max(reset, ahead)
end

if refusing == 0 then
    for i = 1, count do
        redis.call("SET", KEYS[i], string.format("%.0f", tats[i]), "PX",
            string.format("%.0f", math.ceil((tats[i] - now) / 1000)))
    end
end
return {
    tostring(refusing), string.format("%.0f", wait),
    string.format("%.0f", math.max(0, remaining)), string.format("%.0f", reset),
}
