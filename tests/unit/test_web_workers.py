"""What keeps worker processes running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

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


STOPPED = """
import signal
from cachesrv.web.workers import Supervisor

def work(number):
    print("works", flush=True)
    signal.pause()

def reload():
    print("reloads", flush=True)
    return False

Supervisor(1, work, reload).run()
"""

INTERVAL = 0.05
"""Seconds between two signs of life to systemd, for which it wakes up."""


def state(pid: int) -> str:
    """Source: proc(5), /proc/pid/stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_one_that_is_stopped_for_a_while_goes_on() -> None:
    """As by Ctrl-Z and `fg`: the time that it was waiting for is over then, and no signal has come."""
    environment = {**os.environ, "WATCHDOG_USEC": str(int(2_000_000 * INTERVAL))}
    command = (sys.executable, "-c", STOPPED)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "reloads\n"
        for _ in range(5):
            process.send_signal(signal.SIGSTOP)
            while state(process.pid) != "T":
                time.sleep(0.001)
            time.sleep(2 * INTERVAL)
            process.send_signal(signal.SIGCONT)
            time.sleep(INTERVAL / 2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""
        assert process.wait() == 0
