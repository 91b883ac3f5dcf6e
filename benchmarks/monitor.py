"""Counting what clients send to the server, by MONITOR; what scripts run inside is not counted."""

import re
import socket
from typing import Self

from .peers import Server


class Monitor:
    """Counts from one call of ``count`` to the next. It slows the server down: nothing is timed meanwhile."""

    _MARK = re.compile(rb'"PING" "petiole-mark-(\d+)"')

    def __init__(self, server: Server) -> None:
        self._place = (server.host, server.port)
        self._marks = 0

    def __enter__(self) -> Self:
        self._asking = socket.create_connection(self._place)
        self._listening = socket.create_connection(self._place)
        self._hearing = self._listening.makefile("rwb")
        self._hearing.write(b"MONITOR\r\n")
        self._hearing.flush()
        self._hearing.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self._hearing.close()
        self._listening.close()
        self._asking.close()

    def count(self) -> int:
        """How many commands there were since the last count."""
        self._marks += 1
        self._asking.sendall(b"PING petiole-mark-%d\r\n" % self._marks)
        self._asking.recv(1_024)
        seen = 0
        for line in self._hearing:
            if mark := self._MARK.search(line):
                if int(mark[1]) == self._marks:
                    break
            elif b" lua] " not in line:
                seen += 1
        return seen
