-- Read the oldest rows of a partition. Nothing is taken away: that is for the trim, after the commit.
--
-- KEYS: stream
-- ARGV: count
-- RETURNS: {run, now_ms, {{id, {field, value, ...}}, ...}}
--
-- One script, because the run that is named must be the one that the entries were read in: a trim in
-- another run could meet ids that were given anew.

local info = redis.pcall("INFO", "server")
local run = type(info) == "string" and string.match(info, "run_id:(%x+)") or ""
local time = redis.call("TIME")
local now_ms = string.format("%.0f", time[1] * 1000 + math.floor(time[2] / 1000))
return {string.sub(run, 1, 12), now_ms, redis.call("XRANGE", KEYS[1], "-", "+", "COUNT", ARGV[1])}
