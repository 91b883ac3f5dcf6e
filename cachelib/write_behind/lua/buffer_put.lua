-- Append a row to one partition of a buffer, unless it is full.
--
-- KEYS: stream
-- ARGV: payload, max_length, batch_size
-- RETURNS: {id or false when full, length, kick: 1 when a batch has just become full}
--
-- One script, because a bound that is checked apart from the append is not kept. Each entry carries the run
-- id of the server that gave it its id: ids rise within one run of one server, and only there. A server that
-- does not let us ask (INFO is not for everybody) gives an empty one: then nothing tells a lost tail from old
-- entries, should its clock ever go back.

local length = redis.call("XLEN", KEYS[1])
if length >= tonumber(ARGV[2]) then
    return {false, length, 0}
end
local info = redis.pcall("INFO", "server")
local run = type(info) == "string" and string.match(info, "run_id:(%x+)") or ""
local id = redis.call("XADD", KEYS[1], "*", "r", string.sub(run, 1, 12), "d", ARGV[1])
length = length + 1
return {id, length, length % tonumber(ARGV[3]) == 0 and 1 or 0}
