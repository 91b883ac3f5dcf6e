-- USES: _turns
-- Take units, or the last place in the queue for them; asked again with the same token, tell how it stands.
--
-- KEYS: state, queue
-- ARGV: token, units, lease_ms, capacity, channel, least_fence, label
-- RETURNS: {1 held, 0 not, -1 never; fence of a hold, 0; end of its lease, or of the first lease to run out, 0; now;
-- how many wait before it; 1 if it had its place in the queue before}
-- channel: on which its process is told of a grant; empty: it does not wait.
-- capacity: how many units there are, unless another number was set (turn_resize).
-- least_fence: a fence that the new one must reach; where there is a hold already, its fence is raised.
--
-- One script, because between a look at who holds and who waits and the change of it somebody else could come, and two
-- would hold, or one would overtake those who wait. With the token chosen by the caller a lost reply is asked for again.

local state, queue = KEYS[1], KEYS[2]
local token, channel = ARGV[1], ARGV[5]
local units, lease_ms, least_fence = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[6])
local now = turn_now()
local turn = turn_open(state, queue, now, ARGV[4], token)
local rest = (channel == "" and "-" or channel) .. " " .. ARGV[7]

turn_settle(state, queue, turn)
local answer
if turn.held then
    local terms, fence, ends, label = string.match(turn.held, "^(%d+ %d+) (%d+) (%d+) (.*)$")
    local raised = math.max(tonumber(fence), least_fence)
    if raised > tonumber(fence) then
        turn.fence = math.max(turn.fence, raised)
        turn_change(state, turn, "h" .. token, terms .. " " .. turn_text(raised) .. " " .. ends .. " " .. label)
    end
    answer = {1, raised, tonumber(ends), now, 0, 0}
elseif units > turn.capacity then
    answer = {-1, 0, 0, now, 0, 0}
elseif turn.waiting == 0 and turn.used + units <= turn.capacity then
    turn_begin(state, turn, token, units, lease_ms, least_fence, rest)
    answer = {1, turn.fence, now + lease_ms * 1000, now, 0, 0}
else
    local place = turn.waiting > 0 and redis.call("ZRANK", queue, token)
    local ahead = place or turn.waiting
    if channel ~= "" then
        local since = turn_text(now)
        if place then -- it may have another channel by now
            since = string.match(redis.call("HGET", state, "w" .. token) or "", "^%d+ %d+ (%d+)") or since
        else
            turn.waiting, turn.queued = turn.waiting + 1, true
            redis.call("ZADD", queue, redis.call("HINCRBY", state, "ticket", 1), token)
        end
        turn_change(state, turn, "w" .. token, units .. " " .. lease_ms .. " " .. since .. " " .. rest)
    end
    answer = {0, 0, turn.next_end, now, ahead, place and 1 or 0}
end
turn_close(state, queue, turn)
return answer
