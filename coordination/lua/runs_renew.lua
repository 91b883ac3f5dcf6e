-- Prolong what says that attempts of tasks run.
--
-- KEYS: runs...
-- ARGV: nonces..., leases_ms...
-- RETURNS: for each 1 if that delivery was still known to run, else 0: one that is over is not made anew
--
-- One script, because one that is looked at and found must not end, and another begin, before it is prolonged.

local answers = {}
for i, run in ipairs(KEYS) do
    local known = redis.call("GET", run)
    local nonce = ARGV[i] .. " "
    answers[i] = 0
    if known and string.sub(known, 1, #nonce) == nonce then
        redis.call("PEXPIRE", run, ARGV[#KEYS + i])
        answers[i] = 1
    end
end
return answers
