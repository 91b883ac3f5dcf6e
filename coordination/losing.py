"""What becomes of a task when what it holds is lost while it runs: it is told, or it is stopped."""

import os
import signal
import threading
from typing import Any

from .admitted import Admitted


def terminate_when_lost(task: Any, admitted: Admitted) -> None:
    """Stop the running task when a hold of it is lost: as a soft time limit does, in a pool of processes."""
    if threading.current_thread() is not threading.main_thread():
        return  # in a pool of threads nothing can be stopped: the task looks for itself

    def stop(_: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    for hold in admitted.holds.values():
        hold.on_lost(stop)
