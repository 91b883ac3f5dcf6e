"""One of many processes that admit, park, wake and end the tasks of one lot, until all tasks have run.

Each is a worker and a pump at once, so that everything happens at the same time and twice. The broker is a list. Said
at the end: which tasks ran here, and the most that were inside at once.
"""

import inspect
import json
import random
import sys

from petiole.cachelib import Settings, connect
from petiole.coordination.gates import Gates, Served
from petiole.coordination.parking import Attempt, ParkingLot, Running


def call(key):
    """The task."""


def main(url, name, number, calls, everybody):
    ran, most, most_of_lock = [], 0, 0
    chance = random.Random(number)
    with connect(settings=Settings(url=url)) as redis:
        client, lot = redis.coordination, ParkingLot(redis, name)
        gates = Gates(f"{name}.task", inspect.signature(call), lock=f"{name}:{{key}}", concurrency=3, fair="{key}")
        post, inside = f"post:{name}", f"inside:{name}"
        for n in range(calls):
            client.lpush(post, json.dumps([f"{number}-{n}", 0]))
        while client.scard(f"done:{name}") < everybody:
            found = client.rpop(post)
            if found is not None:
                id, generation = json.loads(found)
                key = hash_of(id)
                outcome = lot.admit(Attempt(id, 0, generation, "task"), gates.of([key], {}), record=b"{}")
                if isinstance(outcome, Running):
                    ran.append(id)
                    most = max(most, client.incr(inside))
                    most_of_lock = max(most_of_lock, client.incr(f"{inside}:{key}"))
                    client.decr(f"{inside}:{key}")
                    client.decr(inside)
                    lot.end(outcome)
                    client.sadd(f"done:{name}", id)
            if found is None or chance.random() < 0.2:
                pump(lot, client, post, chance)
    sys.stdout.write(json.dumps({"ran": ran, "most": most, "most_of_lock": most_of_lock}))


def hash_of(id):
    return sum(id.encode()) % 4


def pump(lot, client, post, chance):
    due = lot.next()
    for line, definition in due.lines:
        if definition:  # another process may have served it meanwhile
            lot.serve(line, Served.read(definition))
    for id in due.tasks:
        lot.wake(id, "=")
    for message in due.woken:
        for _ in range(chance.choice((1, 1, 1, 2))):
            client.lpush(post, json.dumps([message.id, message.generation]))
    if due.woken:
        lot.sent(due.woken, forget=[False] * len(due.woken))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
