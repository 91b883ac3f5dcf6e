-- Claim that a call of a task is the only one that has been sent.
--
-- KEYS: claim, state
-- ARGV: id, ttl_ms, replace
-- RETURNS: {1 if it is claimed, else 0; the id of the call that has it, or the empty text}
-- state: of the permit that the one that runs has; the claim itself where there is none. replace: 1 to take it from a call that waits.
--
-- One script, because two that look at the same moment would both find it free.

local claimed = redis.call("GET", KEYS[1])
if claimed and claimed ~= ARGV[1] and ARGV[3] == "0" then
    return { 0, claimed }
end
local state = KEYS[2]
if state ~= KEYS[1] and ARGV[3] == "0" and tonumber(redis.call("HGET", state, "used") or 0) > 0 then
    local fields = redis.call("HGETALL", state)
    for i = 1, #fields, 2 do
        if string.sub(fields[i], 1, 1) == "h" then
            local ends = string.match(fields[i + 1], "^%d+ %d+ %d+ (%d+)")
            local time = redis.call("TIME")
            local runs = string.match(fields[i], "^h(.*)%.%d+$")
            if tonumber(ends) > time[1] * 1000000 + time[2] and runs and runs ~= ARGV[1] then
                return { 0, runs }
            end
        end
    end
end
redis.call("SET", KEYS[1], ARGV[1], "PX", ARGV[2])
return { 1, "" }
