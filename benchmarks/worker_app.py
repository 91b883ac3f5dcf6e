"""What the workers of the benchmarks load: ``celery -A benchmarks.worker_app``, with the server in the environment."""

import os
from contextlib import ExitStack

from .task_peers import task_peers
from .waiting_peers import waiting_peers
from .workers import BROKER, GATES

_open = ExitStack()  # for as long as the process lives
app = (
    waiting_peers(_open, os.environ[BROKER], os.environ[GATES]).app
    if GATES in os.environ
    else task_peers(_open, os.environ[BROKER]).app
)
