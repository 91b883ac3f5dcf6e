-- USES: _parking
-- Note that woken tasks have been sent.
--
-- KEYS: woken, waits, parked, due
-- ARGV: ids..., tokens..., generations..., forget..., again_ms...
-- RETURNS: how many were noted
-- again_ms: after which time they are sent once more, if they have not come: what lay in the broker was lost.
-- forget: 1 for those that will not come to the gates again: nothing is known of them from now on.
--
-- One script, because a task that has come meanwhile, or was parked anew, must not be noted.

local woken, waits, parked, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local count, noted = #ARGV / 5, 0
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]
for i = 1, count do
    local id = ARGV[i]
    local entry = park_look(waits, id)
    local same = entry and entry.token == ARGV[count + i] and entry.generation == tonumber(ARGV[2 * count + i])
    if same and (entry.mode == "w" or entry.mode == "a") then
        redis.call("ZREM", woken, id)
        if ARGV[3 * count + i] == "1" then
            park_forget(waits, parked, woken, due, id)
        else
            entry.mode = "s"
            park_note(waits, id, entry)
            redis.call("ZADD", due, "LT", string.format("%.0f", now + ARGV[4 * count + i] * 1000), "=" .. id)
        end
        noted = noted + 1
    elseif not entry then
        redis.call("ZREM", woken, id)
    end
end
return noted
