"""Who is impatient gets the end at once, and no stack."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys, threading, time
from cachesrv.__main__ import main

def linger():
    while threading.main_thread().is_alive():  # until the interpreter waits for its threads
        time.sleep(0.01)
    print("at exit", flush=True)
    time.sleep({seconds})

signal.signal(signal.SIGINT, signal.{handler})
threading.Thread(target=linger).start()
sys.argv[1:] = ["--version"]
main()
"""


@pytest.mark.parametrize(
    ("handler", "seconds", "status"), [("default_int_handler", 60, -signal.SIGINT), ("SIG_IGN", 0.3, 0)]
)
def test_an_interrupt_while_threads_are_waited_for(handler: str, seconds: float, status: int) -> None:
    program = PROGRAM.format(handler=handler, seconds=seconds)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "at exit\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (status, "")
