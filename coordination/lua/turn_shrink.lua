-- USES: _turns
-- Give back all but so many of the units of a hold, and grant them to those who come next.
--
-- KEYS: state, queue
-- ARGV: token, capacity, units
-- RETURNS: 1 if it is held, with so many units or fewer; 0 if it is not held any more
--
-- One script, because what is given back is handed on in the same moment, and a hold that is gone is not made anew.

local state, queue = KEYS[1], KEYS[2]
local token, units = ARGV[1], tonumber(ARGV[3])
local turn = turn_open(state, queue, turn_now(), ARGV[2], token)

turn_reclaim(state, turn, false)
if turn.held then
    local had, rest = string.match(turn.held, "^(%d+) (.*)$")
    if units < tonumber(had) then
        turn.used = turn.used - (tonumber(had) - units)
        turn_change(state, turn, "h" .. token, units .. " " .. rest)
    end
end
turn_settle(state, queue, turn)
turn_close(state, queue, turn)
return turn.held and 1 or 0
