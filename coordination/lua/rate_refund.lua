-- USES: _rate
-- Give back what a call was charged, to each limit as far as that is safe.
--
-- KEYS: states...
-- ARGV: cost, permit, kinds..., counts..., spans_us..., rests..., parts..., firsts..., seconds...
-- RETURNS: 1
--
-- kinds: as rate_hit is given them; in capitals those that count calls, whatever they cost.
-- firsts: with seconds the receipt, as rate_hit returned it. A permit is given back only if there is one to name.
--
-- One script, because what may be given back depends on what is there at that moment. Given back is what counts now
-- and would not count had the call never been charged; what is paid off or over stays as it is. A receipt is good for
-- one refund: a second one would give back what others were charged.

local cost, permit = tonumber(ARGV[1]), ARGV[2]
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]

local count = #KEYS
for i = 1, count do
    local key, kind = KEYS[i], ARGV[2 + i]
    local limit = rate_limit(key, now, string.lower(kind), tonumber(ARGV[2 + count + i]), tonumber(ARGV[2 + 2 * count + i]),
        tonumber(ARGV[2 + 3 * count + i]), tonumber(ARGV[2 + 4 * count + i]))
    limit.refund(kind == string.upper(kind) and 1 or cost, tonumber(ARGV[2 + 5 * count + i]), tonumber(ARGV[2 + 6 * count + i]), permit)
end
return 1
