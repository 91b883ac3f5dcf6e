"""A process with a pump that leads, to be killed."""

import sys
from threading import Event

from celery import Celery
from local_nodes import eventually

from petiole.cachelib import Settings, connect
from petiole.coordination.parking import ParkingLot
from petiole.tasks.pump import Pump

if __name__ == "__main__":
    url, name = sys.argv[1:]
    with connect(settings=Settings(url=url)) as redis:
        pump = Pump(Celery(name, broker=url), ParkingLot(redis, name))
        pump.start()
        eventually(lambda: pump.leads, "it leads")
        sys.stdout.write("leads\n")
        sys.stdout.flush()
        Event().wait(60)
