"""The scripts of the queue against its model, on a clock and a crowd of our own, and on a Cluster."""

from uuid import uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_nodes import eventually

from petiole.cachelib.scripts import Script
from petiole.coordination import keys, turn_store
from petiole.coordination.inspecting import inspected
from petiole.coordination.turn_store import TurnStore
from tests.unit.test_turn_model import CHANNELS, Turns, play, schedules

CLOCK = 'local time = redis.call("TIME")\n    return time[1] * 1000000 + time[2]'
OUR_CLOCK = "return tonumber(ARGV[#ARGV])"
PUBLISH, OUR_PUBLISH = 'redis.call("PUBLISH", ', "tell("
LISTENERS, OUR_LISTENERS = 'redis.call("PUBSUB", "NUMSUB", channel)[2]', "listeners(channel)"
CROWD = """
local function listeners(channel)
    return redis.call("SISMEMBER", ARGV[#ARGV - 1] .. ":alive", channel)
end

local function tell(channel, text)
    if listeners(channel) == 0 then
        return 0
    end
    redis.call("RPUSH", ARGV[#ARGV - 1] .. ":told", channel .. " " .. text)
    return 1
end
"""


def ours(script):
    """The same script on a clock that the test turns, with listeners that the test names."""
    assert script.text.count(CLOCK) == 1, "the scripts ask for the time in another way"
    text = script.text.replace(CLOCK, OUR_CLOCK).replace(PUBLISH, OUR_PUBLISH).replace(LISTENERS, OUR_LISTENERS)
    assert "PUB" not in text, "the scripts tell, or ask who listens, in another way"
    header = next(line for line in text.splitlines() if line.startswith("-- ARGV: "))
    return Script(f"{script.name}_ours", CROWD + text.replace(header, f"{header}, crowd, now_us"), script.decode)


TAKE, GIVE, RENEW, CLEAR, RESIZE, SHRINK = (
    ours(getattr(turn_store, name)) for name in ("_TAKE", "_GIVE", "_RENEW", "_CLEAR", "_RESIZE", "_SHRINK")
)


class Scripts:
    """The operations of the model, by the scripts."""

    def __init__(self, redis, made_with):
        self.client, self.crowd, self.made_with = redis.coordination, f"crowd:{uuid4().hex}", made_with
        self.state = keys.turn("model", uuid4().hex)
        self.keys = {"state": self.state, "queue": keys.turn_queue(self.state)}
        self.client.sadd(f"{self.crowd}:alive", *CHANNELS)

    def play(self, operation, now_us):
        common = {**self.keys, "capacity": self.made_with, "crowd": self.crowd, "now_us": now_us}
        match operation:
            case "take", token, units, lease_ms, channel:
                wanted = {"token": token, "units": units, "lease_ms": lease_ms, "channel": channel}
                taken = TAKE(self.client, **common, **wanted, least_fence=0, label="somebody who waits")
                assert taken.now_us == now_us
                return taken.state, taken.fence, taken.ends_us, taken.ahead, taken.queued_before
            case "give", token:
                return bool(GIVE(self.client, **common, token=token))
            case "renew", token, lease_ms:
                lease = {"states": [self.state], "tokens": [token], "leases_ms": [lease_ms]}
                return RENEW(self.client, **lease, crowd=self.crowd, now_us=now_us) == [1]
            case "shrink", token, units:
                return SHRINK(self.client, **common, token=token, units=units)
            case "resize", units:
                return RESIZE(self.client, **common, units=units or 0)
            case ("clear",):
                return CLEAR(self.client, **common)
            case "die", channel:
                self.client.srem(f"{self.crowd}:alive", channel)
            case "live", channel:
                self.client.sadd(f"{self.crowd}:alive", channel)
            case ("lose_all",):
                self.client.delete(self.keys["state"])
        return None

    def told(self):
        raw = [line.decode().split(" ") for line in self.client.lrange(f"{self.crowd}:told", 0, -1)]
        return [(channel, token, int(fence), int(ends_us)) for channel, token, fence, ends_us in raw]

    def seen(self):
        """Who holds and who waits, as it is stored."""
        state = {field.decode(): value.decode() for field, value in self.client.hgetall(self.keys["state"]).items()}
        queue = [token.decode() for token in self.client.zrange(self.keys["queue"], 0, -1)]
        held = {field[1:]: value.split(" ", 5) for field, value in state.items() if field[0] == "h" and len(field) == 2}
        waiting = {
            field[1:]: value.split(" ", 4) for field, value in state.items() if field[0] == "w" and len(field) == 2
        }
        assert all(label == "somebody who waits" for *_, label in [*held.values(), *waiting.values()])
        holds = {token: (int(units), int(fence), int(end)) for token, (units, _, fence, end, _, _) in held.items()}
        places = {token: (int(units), channel) for token, (units, _, _, channel, _) in waiting.items()}
        return int(state.get("fence", 0)), int(state.get("used", 0)), holds, queue, places

    def forget(self):
        self.client.unlink(*self.keys.values(), f"{self.crowd}:told", f"{self.crowd}:alive")


def modelled(turns):
    return (
        turns.fence,
        turns.used,
        {token: (held.units, held.fence, held.ends_us) for token, held in turns.holds.items()},
        [place.token for place in turns.queue],
        {place.token: (place.units, place.channel) for place in turns.queue},
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(made_with=st.integers(1, 4), schedule=schedules)
def test_the_scripts_agree_with_the_model_on_every_schedule(redis, made_with, schedule):
    """The same answers, the same grants in the same order, the same fences and ends; and at last nothing is left."""
    turns, scripts = Turns(made_with), Scripts(redis, made_with)
    for operation in [*schedule, *(("give", token) for token in "abcdefgh")]:
        now_us = turns.now_us
        answer, expected = scripts.play(operation, now_us), play(turns, operation)
        if operation[0] == "take" and expected[0] == 0:  # of the first end a bound is told, which is not over
            assert now_us < answer[2] <= expected[2]
            answer = (*answer[:2], expected[2], *answer[3:])
        assert answer == expected, operation
        if operation[0] != "lose_all":  # what is lost is found by the next that looks
            assert scripts.told() == turns.told
        if operation[0] in ("take", "give", "resize", "clear", "shrink"):
            assert scripts.seen() == modelled(turns)
            assert all(scripts.client.pttl(key) != -1 for key in scripts.keys.values())
    kept = {field.decode() for field in scripts.client.hkeys(scripts.keys["state"])}
    assert not {field for field in kept if field[0] in "hw" and field[1:] in set("abcdefgh")}
    assert scripts.client.exists(scripts.keys["queue"]) == 0
    assert scripts.client.hget(scripts.keys["state"], "used") == b"0"
    scripts.forget()


def wait(store, token, units=1, channel="nobody", lease_ms=30_000):
    return store.take(token, units, lease_ms, channel, "label")


def test_the_dead_are_passed_over_however_many_there_are(redis, name):
    """The first that lives is granted by the very release, after 250 that do not."""
    store, ours = TurnStore(redis, "lock", name, 1), redis.coordination.pubsub()
    ours.subscribe(f"{name}:here")
    ours.get_message(timeout=5)
    assert wait(store, "holder").state == 1
    for number in range(250):
        wait(store, f"dead{number}")
    wait(store, "alive", channel=f"{name}:here")
    wait(store, "later", channel=f"{name}:here")
    assert store.give("holder")
    told = ours.get_message(timeout=5)["data"].decode().split(" ")
    assert told[0] == "alive"
    seen = store.read()
    assert (holders(seen), seen.queue) == ({"alive"}, ["later"])
    ours.close()


def test_all_for_whom_there_is_room_are_granted_however_many_there_are(redis, name):
    store, ours = TurnStore(redis, "semaphore", name, 1), redis.coordination.pubsub()
    ours.subscribe(f"{name}:here")
    ours.get_message(timeout=5)
    assert wait(store, "holder").state == 1
    for number in range(300):
        wait(store, f"w{number}", channel=f"{name}:here")
    assert store.resize(251) == 251
    seen = store.read()
    assert (len(holders(seen)), len(seen.queue)) == (251, 50)
    assert seen.queue == [f"w{number}" for number in range(250, 300)]
    ours.close()


def test_all_whose_leases_have_run_out_make_room_at_once(redis, name):
    store = TurnStore(redis, "semaphore", name, 300)
    for number in range(299):
        assert wait(store, f"h{number}", lease_ms=1).state == 1
    assert wait(store, "stays").state == 1
    eventually(lambda: len(inspected(store.read()).holders) == 1, "the others run out")
    assert wait(store, "too many", 300, "").state == 0
    assert wait(store, "next", 299, "").state == 1


def holders(snapshot):
    return {field[1:] for field in snapshot.state if field[0] == "h"}
