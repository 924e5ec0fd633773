"""What keeps worker processes running."""

from __future__ import annotations

import subprocess
import sys

SCARCE = """
import os, signal
from cachesrv import telemetry
from cachesrv.web import workers

fork, failures = os.fork, [OSError(11, "Resource temporarily unavailable")]
reading, writing = os.pipe()

def scarce():
    if failures:
        raise failures.pop()
    return fork()

def work(number):
    if number == 0:
        os.read(reading, 1)
    print("worker", number, flush=True)
    if number == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    else:
        os.write(writing, b"1")
    signal.pause()

telemetry.configure_logging()
os.fork, workers._PAUSE = scarce, 0.1
workers.Supervisor(2, work, lambda: True).run()
print("the end")
"""


def test_a_worker_that_cannot_be_started_is_started_later() -> None:
    """In a process of its own, which has room for no other one at first."""
    done = subprocess.run([sys.executable, "-c", SCARCE], check=True, capture_output=True, text=True, timeout=60)
    # The first one is started when there is room, and ends them all when the second one is there.
    assert done.stdout.splitlines() == ["worker 1", "worker 0", "the end"]
    assert "a worker cannot be started at present" in done.stderr
