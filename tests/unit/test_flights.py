"""Flights: who may join one, and what those who joined are brought."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from petiole.cachelib.flights import Flight, Flights

LONG_S = 60


def test_a_key_has_no_flight_until_one_is_opened():
    """And each key its own."""
    flights = Flights()
    flight = flights.open("a")

    assert flights.get("a") is flight
    assert flights.get("b") is None


def test_all_who_join_are_brought_what_makes_the_value():
    """Each makes one of its own of it, as the type that it wants."""
    flights = Flights()
    flight, joining = flights.open("k"), threading.Barrier(9)

    def join():
        joined = flights.get("k")
        joining.wait(LONG_S)
        return joined.join(LONG_S)(list)

    with ThreadPoolExecutor(8) as pool:
        values = [pool.submit(join) for _ in range(8)]
        joining.wait(LONG_S)
        flights.close("k", flight)
        flight.land(lambda kind: kind((1, 2)))
        made = [value.result(LONG_S) for value in values]

    assert made == [[1, 2]] * 8
    assert len({id(value) for value in made}) == 8


def test_who_joins_a_flight_that_has_landed_is_brought_the_same():
    """It was found while it was open, so its value is recent enough."""
    flight = Flight()
    flight.land(str)

    assert flight.join(0) is str


def test_a_flight_that_brings_nothing_sends_away_those_who_joined():
    """They look for themselves."""
    flight = Flight()
    flight.land(None)

    assert flight.join(LONG_S) is None


def test_who_does_not_want_to_wait_any_longer_is_brought_nothing():
    """The flight goes on."""
    flight = Flight()

    assert flight.join(0.001) is None
    flight.land(str)
    assert flight.join(0.001) is str


def test_a_closed_flight_is_joined_by_nobody_new():
    """What it brings may be older than an invalidation that they know of."""
    flights = Flights()
    flight = flights.open("k")
    flights.close("k", flight)

    assert flights.get("k") is None
    assert flights.open("k") is not flight


def test_a_second_flight_of_a_key_is_joined_by_nobody():
    """The first stays the one to join; to close the second does not close it."""
    flights = Flights()
    first, second = flights.open("k"), flights.open("k")

    assert second is not first
    assert flights.get("k") is first
    flights.close("k", second)
    assert flights.get("k") is first


def test_to_close_a_flight_late_does_not_close_the_next_one():
    """A load that timed out closes its flight twice."""
    flights = Flights()
    first = flights.open("k")
    flights.close("k", first)
    second = flights.open("k")
    flights.close("k", first)

    assert flights.get("k") is second


def test_of_many_who_open_at_once_one_is_joined():
    """And nothing is left when all are closed."""
    flights, together = Flights(), threading.Barrier(8)

    def fly(_):
        together.wait(LONG_S)
        flight = flights.open("k")
        together.wait(LONG_S)
        joinable = flights.get("k") is flight
        together.wait(LONG_S)
        flights.close("k", flight)
        return joinable

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(fly, range(8))) == [False] * 7 + [True]
    assert flights.get("k") is None
    assert repr(flights) == "<Flights [0 open]>"


def test_a_forked_child_joins_no_flight_of_its_parent():
    """The thread that would land it is not there; nor is the one that held the lock."""
    flights = Flights()
    flights.open("k")
    with flights._lock:
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            try:
                alone = flights.get("k") is None
                flights.close("k", flights.open("k"))
                os._exit(0 if alone else 1)
            finally:
                os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert status == 0
    assert flights.get("k") is not None
