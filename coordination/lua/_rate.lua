-- The states of rate limits: how each is stored, when a cost fits, what a charge and a refund make of it.
--
-- rate_limit reads a state and returns what can be done with it: earliest(cost) tells when a cost fits; charge(cost,
-- start, permit) writes, and returns two numbers by which refund(cost, first, second, permit) can take the charge
-- back; left() tells what is left now, and when all is paid off. A limit is count, span, rest and part, whose
-- meaning is told for each kind below. All times are whole microseconds, which stay below 2^53, where Lua computes
-- exactly. rate_algorithms.py has the same as models. What is not asked for is not even defined, for a script
-- defines its functions at each call.
--
-- "g", smooth (GCRA). count: the burst; a call takes span and rest/part microseconds. Stored: when all is paid off
-- (the theoretical arrival time), "us" or "us rest part"; and after a refund, or a reservation of a time to come,
-- also how much was ever given back, the latest time that was ever promised as the one when all is paid off, the
-- time below which it must not fall, and the sum of us and what was given back at the last reservation, which tells
-- what was charged since. All four are forgotten when that latest time is over. Why they are needed: a refund may
-- give back only what is not paid off yet, and earlier refunds move up when that is; and a reserved start does not
-- move, though what was before it is given back.
-- "l", log. count calls in span. Stored: capacity and position (4 bytes each), the last time that was ever charged
-- (8), then a ring of times (8 bytes each) from the oldest to the newest, the position being that of the oldest; 0
-- is a free one. What is free or over comes first, so a cost fits when the last one that it would overwrite is over.
-- The ring grows when count does and never shrinks, so nothing is forgotten that counts. Nobody is admitted before
-- the last time, be it given back: what was over by then is overwritten.
-- "b", buckets. count calls in part buckets of span. Stored: span, number of the newest bucket, what is in it, in
-- the one before it, ... One bucket more than part is counted: the oldest is partly over. What was counted in
-- buckets of another span is put into the newest, where it counts for longer than it would have, never for less
-- long.
-- "f", window of span aligned to rest; "w", window of span from the first call. Stored: its begin, and what is used.
-- "c", at once. count permits of span. Stored: a sorted set of permits by when they end.

local function rate_text(number)
    return string.format("%.0f", number)
end

local function rate_ttl(us)
    return rate_text(math.max(1, math.ceil(us / 1000)))
end

local function rate_smooth(key, now, count, span, rest, part)
    local raw = redis.call("GET", key)
    local us, parts, of, given, highest, lowest, reserved = tonumber(raw or 0), 0, part, 0, 0, 0, 0
    if not us then
        us, parts, of, given, highest, lowest, reserved =
            string.match(raw, "^(%d+) (%d+) (%d+) ?(%d*) ?(%d*) ?(%d*) ?(%d*)$")
        us, parts, of = tonumber(us), tonumber(parts), tonumber(of)
        given, highest = tonumber(given) or 0, tonumber(highest) or 0
        lowest, reserved = tonumber(lowest) or 0, tonumber(reserved) or 0
    end
    if parts > 0 and of ~= part then
        us, parts = us + 1, 0
    end
    if highest <= now then
        given, highest, lowest, reserved = 0, 0, 0, 0
    end
    if us < now then
        us, parts = now, 0
    end

    local function price(cost)
        if rest == 0 then
            return cost * span, 0
        end
        return cost * span + math.floor(cost * rest / part), cost * rest % part
    end

    local function write()
        local last, value = us, rate_text(us)
        if parts > 0 then
            last = us + 1
            value = string.format("%.0f %.0f %.0f", us, parts, part)
        end
        if highest > 0 then
            highest = math.max(highest, last)
            last = highest
            value = string.format("%.0f %.0f %.0f %.0f %.0f %.0f %.0f",
                us, parts, part, given, highest, lowest, reserved)
        end
        redis.call("SET", key, value, "PX", rate_ttl(last - now))
    end

    local function earliest(cost)
        local spare, spare_parts = price(count - cost)
        if parts > spare_parts then
            spare = spare - 1
        end
        return math.max(now, us - spare)
    end

    local function charge(cost, start)
        local more, more_parts = price(cost)
        if start > now or lowest > now then
            lowest = math.max(lowest, start) + more
            if more_parts > 0 then
                lowest = lowest + 1
            end
            highest = math.max(highest, us)
        end
        if us < start then
            us, parts = start, 0
        end
        us, parts = us + more, parts + more_parts
        if parts >= part then
            us, parts = us + 1, parts - part
        end
        if start > now then
            reserved = us + given
        end
        write()
        return us, given
    end

    local function left()
        local ahead = us - now
        if rest == 0 and parts == 0 then
            return math.max(0, count - math.ceil(ahead / span)), ahead
        end
        -- Division may be off by one where a call takes no whole number of microseconds; what fits is decided exactly.
        local remaining = math.max(0, math.min(count, count - math.ceil(ahead / (span + rest / part)) + 1))
        while remaining > 0 and earliest(remaining) > now do
            remaining = remaining - 1
        end
        if parts > 0 then
            ahead = ahead + 1
        end
        return remaining, ahead
    end

    local function refund(cost, promised, given_then)
        local room = promised - math.max(0, given - given_then) - now
        if room <= 0 or us <= now or given > 2 ^ 52 then
            return
        end
        local back, back_parts = price(cost)
        if back >= room then
            back, back_parts = room, 0
        end
        local new, new_parts, floor = us - back, parts - back_parts, lowest
        if new_parts < 0 then
            new, new_parts = new - 1, new_parts + part
        end
        if promised + given_then >= reserved then
            floor = math.max(0, lowest - back)
        end
        if new < floor then
            if us < floor then
                return
            end
            new, new_parts = floor, 0
        end
        if new < now then
            new, new_parts = now, 0
        end
        highest = math.max(highest, us + 1)
        us, parts, lowest, given = new, new_parts, floor, given + back
        if back_parts > 0 then
            given = given + 1
        end
        write()
    end

    return { earliest = earliest, charge = charge, left = left, refund = refund }
end

local function rate_log(key, now, count, span)
    local header = redis.call("GETRANGE", key, 0, 15)
    local capacity, position, last = count, 0, 0
    if #header == 16 then
        capacity, position, last = struct.unpack(">I4I4d", header)
    end

    local function slot(place)
        local at = 16 + 8 * ((position + place) % capacity)
        local raw = redis.call("GETRANGE", key, at, at + 7)
        if #raw < 8 then
            return 0
        end
        return (struct.unpack(">d", raw))
    end

    -- The place of the first one, from low on, that still counts at a time.
    local function first_that_counts(low, at)
        local high = capacity
        while low < high do
            local middle = math.floor((low + high) / 2)
            if slot(middle) + span > at then
                high = middle
            else
                low = middle + 1
            end
        end
        return low
    end

    local function put(place, slots)
        local first = (position + place) % capacity
        local fit = math.min(#slots / 8, capacity - first)
        redis.call("SETRANGE", key, 16 + 8 * first, string.sub(slots, 1, 8 * fit))
        if 8 * fit < #slots then
            redis.call("SETRANGE", key, 16, string.sub(slots, 8 * fit + 1))
        end
    end

    local function earliest(cost)
        local place, oldest = capacity - count + cost - 1, 0
        if place >= 0 then
            oldest = slot(place)
        end
        return math.max(now, last, oldest + span)
    end

    local function charge(cost, start)
        if capacity < count then
            local old, cut = string.sub(redis.call("GET", key), 17), 8 * position
            old = old .. string.rep("\0", 8 * capacity - #old)
            redis.call("SETRANGE", key, 16, string.sub(old, cut + 1) .. string.sub(old, 1, cut))
            position, capacity = capacity, count
        end
        put(0, string.rep(struct.pack(">d", start), cost))
        position, last = (position + cost) % capacity, start
        redis.call("SETRANGE", key, 0, struct.pack(">I4I4d", capacity, position, last))
        redis.call("PEXPIRE", key, rate_ttl(last + span - now))
        return start, 0
    end

    local function left()
        local reset, before = math.max(0, last + span - now), capacity - count
        if last > now then
            return 0, reset
        end
        return first_that_counts(math.max(0, before), now) - before, reset
    end

    local function refund(cost, start)
        local at = math.max(now, last)
        if start + span <= at then
            return
        end
        local first = first_that_counts(0, at)
        local found = math.min(cost, capacity - first)
        if found > 0 then
            put(first, string.rep("\0", 8 * found))
        end
    end

    return { earliest = earliest, charge = charge, left = left, refund = refund }
end

local function rate_buckets(key, now, count, span, part)
    local numbers, newest, cells = {}, 0, {}
    for number in string.gmatch(redis.call("GET", key) or "", "%d+") do
        numbers[#numbers + 1] = tonumber(number)
    end

    local function move(to)
        local moved = {}
        for age = 0, part do
            moved[age] = cells[age - (to - newest)] or 0
        end
        newest, cells = to, moved
    end

    local function ends(age)
        return (newest - age + part + 1) * span
    end

    local function total()
        local sum = 0
        for age = 0, part do
            sum = sum + cells[age]
        end
        return sum
    end

    local function write()
        local values, used = { rate_text(span), rate_text(newest) }, 0
        for age = 0, part do
            values[age + 3] = rate_text(cells[age])
            if cells[age] > 0 then
                used = age
            end
        end
        redis.call("SET", key, table.concat(values, " ", 1, used + 3), "PX", rate_ttl(ends(0) - now))
    end

    local function earliest(cost)
        local at, sum = math.max(now, newest * span), total()
        for age = part, 0, -1 do
            if sum + cost <= count then
                break
            end
            if cells[age] > 0 then
                sum, at = sum - cells[age], ends(age)
            end
        end
        return at
    end

    local function charge(cost, start)
        move(math.max(newest, math.floor(start / span)))
        cells[0] = cells[0] + cost
        write()
        return newest, span
    end

    local function left()
        local reset = 0
        for age = part, 0, -1 do
            if cells[age] > 0 then
                reset = ends(age) - now
            end
        end
        if newest * span > now then
            return 0, reset
        end
        return math.max(0, count - total()), reset
    end

    local function refund(cost, number, span_then)
        local age = newest - number
        if span_then == span and (cells[age] or 0) > 0 then
            cells[age] = math.max(0, cells[age] - cost)
            write()
        end
    end

    local stored_span, sum = numbers[1], 0
    newest = numbers[2] or 0
    for place = 3, #numbers do
        cells[place - 3] = numbers[place]
        sum = sum + numbers[place]
    end
    if stored_span and stored_span ~= span then
        local last = now
        if newest * stored_span > now then
            last = (newest + 1) * stored_span - 1
        end
        if (newest + 1) * stored_span + part * span <= now then
            sum = 0
        end
        newest, cells = math.floor(last / span), { [0] = sum }
    end
    move(math.max(newest, math.floor(now / span)))
    return { earliest = earliest, charge = charge, left = left, refund = refund }
end

local function rate_window(key, now, count, span, rest, aligned)
    local function begin_of(at)
        if aligned then
            return math.floor((at - rest) / span) * span + rest
        end
        return at
    end

    local raw = redis.call("GET", key)
    local begin, used = begin_of(now), 0
    if raw then
        local stored, amount = string.match(raw, "^(%d+) (%d+)$")
        stored = tonumber(stored)
        if stored > begin - span then
            used = tonumber(amount)
            if stored > begin or not aligned then
                begin = stored
            end
        end
    end

    local function write()
        redis.call("SET", key, rate_text(begin) .. " " .. rate_text(used), "PX", rate_ttl(begin_of(begin) + span - now))
    end

    local function earliest(cost)
        if used + cost <= count then
            return math.max(now, begin)
        end
        return begin_of(begin) + span
    end

    local function charge(cost, start)
        if aligned then
            if begin_of(start) > begin then
                begin, used = begin_of(start), 0
            end
        elseif used == 0 or start >= begin + span then
            begin, used = start, 0
        end
        used = used + cost
        write()
        return begin, 0
    end

    local function left()
        local reset = 0
        if used > 0 then
            reset = begin_of(begin) + span - now
        end
        if begin > now then
            return 0, reset
        end
        return math.max(0, count - used), reset
    end

    local function refund(cost, begin_then)
        if begin_then == begin and used > 0 then
            used = math.max(0, used - cost)
            write()
        end
    end

    return { earliest = earliest, charge = charge, left = left, refund = refund }
end

local function rate_permits(key, now, count, span)
    local over_at = "(" .. rate_text(now)
    local used = redis.call("ZCOUNT", key, over_at, "+inf")

    local function earliest()
        if used < count then
            return now
        end
        local found = redis.call("ZRANGEBYSCORE", key, over_at, "+inf", "WITHSCORES", "LIMIT", used - count, 1)
        return tonumber(found[2])
    end

    local function charge(_, _, permit)
        redis.call("ZREMRANGEBYSCORE", key, "-inf", rate_text(now))
        redis.call("ZADD", key, rate_text(now + span), permit)
        redis.call("PEXPIRE", key, math.max(redis.call("PTTL", key), rate_ttl(span)))
        used = used + 1
        return 0, 0
    end

    local function left()
        local latest = redis.call("ZRANGE", key, -1, -1, "WITHSCORES")
        return math.max(0, count - used), math.max(0, tonumber(latest[2] or 0) - now)
    end

    local function refund(_, _, _, permit)
        redis.call("ZREM", key, permit)
    end

    return { earliest = earliest, charge = charge, left = left, refund = refund }
end

local function rate_limit(key, now, kind, count, span, rest, part)
    if kind == "g" then
        return rate_smooth(key, now, count, span, rest, part)
    elseif kind == "l" then
        return rate_log(key, now, count, span)
    elseif kind == "b" then
        return rate_buckets(key, now, count, span, part)
    elseif kind == "c" then
        return rate_permits(key, now, count, span)
    end
    return rate_window(key, now, count, span, rest, kind == "f")
end
