-- Remove what the sink has committed: every row before an id, if the server still is the one that was read.
--
-- KEYS: stream
-- ARGV: run, min_id
-- RETURNS: how many rows were removed; 0 when the server was restarted since (the next flush trims)
--
-- One script, because after a restart ids may have gone back, and rows that nobody applied could stand
-- before min_id.

local info = redis.pcall("INFO", "server")
local run = type(info) == "string" and string.match(info, "run_id:(%x+)") or ""
if string.sub(run, 1, 12) ~= ARGV[1] then
    return 0
end
return redis.call("XTRIM", KEYS[1], "MINID", "=", ARGV[2])
