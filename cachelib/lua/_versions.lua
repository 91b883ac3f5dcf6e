-- What scripts share: versions of tags, and the head of an entry.
--
-- A version is 13 hexadecimal digits, the number of the invalidation that made it (or of the last one before it was
-- made), and the last 7 characters of the token of who made it. So a load that knows the number at its beginning can tell, at its end, whether a
-- tag has been invalidated meanwhile; and a number that comes again after Redis has lost its keys is told by the token.

local version_length = 20

-- What is no text under a name of ours is nobody's, and is written over.
local function text_of(key)
    local text = redis.pcall("GET", key)
    return type(text) == "string" and text
end

local function sequence_of(key, ttl_ms)
    local number = tonumber(text_of(key))
    if not number or number % 1 ~= 0 then -- never used, or evicted: go on from a number that is higher than any before
        local now = redis.call("TIME")
        number = now[1] * 1000000 + now[2]
        redis.call("SET", key, string.format("%.0f", number), "PX", ttl_ms)
    elseif redis.call("PTTL", key) < tonumber(ttl_ms) / 2 then
        redis.call("PEXPIRE", key, ttl_ms)
    end
    return string.format("%013x", number)
end

-- The version of a tag, kept for at least ttl_ms from now on; made if there is none. It is given twice the time, so that
-- it is seldom touched: to near caches, which hear of every touch, that looks like an invalidation.
local function version_of(tag, sequence, token, ttl_ms)
    local version = text_of(tag)
    ttl_ms = tonumber(ttl_ms)
    if not version or #version ~= version_length then
        version = sequence .. string.sub(token, -7)
        redis.call("SET", tag, version, "PX", string.format("%.0f", ttl_ms * 2))
    elseif redis.call("PTTL", tag) < ttl_ms then
        redis.call("PEXPIRE", tag, string.format("%.0f", ttl_ms * 2))
    end
    return version
end

-- What stands before the body of an entry. Its fields have fixed widths; entry.py reads them.
local function head_of(kind, stale, token, versions)
    return "\193" .. kind .. string.format("%02x", #versions / version_length) .. stale .. token .. versions
end
