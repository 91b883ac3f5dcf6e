"""A process that calls one memoized task so often, waits for all results, and prints them.

>>> LOAD_TEST=... python load_sender.py tag 25
"""

import json
import sys

from load_app import app

tag, calls = sys.argv[1], int(sys.argv[2])
results = [app.tasks["remembered"].delay(tag) for _ in range(calls)]
sys.stdout.write(json.dumps([result.get(timeout=60) for result in results]))
