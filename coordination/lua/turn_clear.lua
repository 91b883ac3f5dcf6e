-- USES: _turns
-- Take from all who hold what they hold, and grant it to those who wait. For people, when a holder is known to be dead.
--
-- KEYS: state, queue
-- ARGV: capacity
-- RETURNS: how many held
--
-- One script, because who is granted in the same moment must have a fence above all that were taken away: the number
-- is raised even if nobody waits.

local state, queue = KEYS[1], KEYS[2]
local turn = turn_open(state, queue, turn_now(), ARGV[1], "")

turn_reclaim(state, turn, false)
local cleared = turn_reclaim(state, turn, true)
turn.fence = math.max(turn.fence + 1, turn.now)
turn_settle(state, queue, turn)
turn_close(state, queue, turn)
return cleared
