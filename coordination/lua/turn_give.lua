-- USES: _turns
-- Give back what a token holds, or its place in the queue, and grant what is free to those who come next.
--
-- KEYS: state, queue
-- ARGV: token, capacity
-- RETURNS: 1 if it held, and its lease had not run out; else 0
--
-- One script, because what is given back is handed on in the same moment: nobody finds it free in between, and if the
-- caller dies now, those who wait are served all the same. Repeated, it does nothing.

local state, queue = KEYS[1], KEYS[2]
local token = ARGV[1]
local turn = turn_open(state, queue, turn_now(), ARGV[2], token)

local was_valid = false
if turn.held then
    was_valid = turn_end(state, turn)
elseif turn.waiting > 0 and redis.call("ZREM", queue, token) == 1 then
    turn.waiting = turn.waiting - 1
    redis.call("HDEL", state, "w" .. token)
end
turn_settle(state, queue, turn)
turn_close(state, queue, turn)
return was_valid and 1 or 0
