-- USES: _turns
-- Prolong the leases of several holds.
--
-- KEYS: states...
-- ARGV: tokens..., leases_ms...
-- RETURNS: for each 1 if it was still held, else 0: one that has run out or was lost is not made anew
--
-- One script, because a lease that is looked at and found valid must not run out before it is prolonged; several,
-- because one thread renews all of a process.

local now = turn_now()
local answers = {}
for i, state in ipairs(KEYS) do
    local field, lease_ms = "h" .. ARGV[i], ARGV[#KEYS + i]
    local known = redis.call("HMGET", state, field, "next_end")
    local units, fence, ends, rest = string.match(known[1] or "", "^(%d+) %d+ (%d+) (%d+) (.*)$")
    answers[i] = 0
    if ends and tonumber(ends) > now then
        local until_us = now + lease_ms * 1000
        redis.call(
            "HSET", state, field, units .. " " .. lease_ms .. " " .. fence .. " " .. turn_text(until_us) .. " " .. rest,
            "next_end", math.min(tonumber(known[2] or 0), until_us)
        )
        if redis.call("PTTL", state) < 3600000 then
            redis.call("PEXPIRE", state, 7200000)
        end
        answers[i] = 1
    end
end
return answers
