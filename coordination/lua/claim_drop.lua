-- Give a claim back.
--
-- KEYS: claim
-- ARGV: id
-- RETURNS: 1 if that call had it, else 0
--
-- One script, because another call may claim it between the look at it and its end.

if redis.call("GET", KEYS[1]) == ARGV[1] then
    redis.call("DEL", KEYS[1])
    return 1
end
return 0
