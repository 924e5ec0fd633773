"""What systemd gives, and what it is told."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cachesrv import systemd
from cachesrv.errors import ConfigError
from cachesrv.systemd import inherited_sockets, notify, watchdog_interval

ME = str(os.getpid())

RECEIVE = """
import os, sys
from cachesrv.systemd import inherited_sockets
environ = dict(os.environ, LISTEN_PID=str(os.getpid()))
sockets = inherited_sockets(environ)
print(*(sock.getsockname()[1] for sock in sockets))
print(*(os.get_inheritable(sock.fileno()) for sock in sockets))
print(sorted(name for name in environ if name.startswith("LISTEN_")))
"""


def test_sockets_are_taken_over() -> None:
    """In a process of its own, whose descriptors 3 and 4 are listening sockets."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [sock.getsockname()[1] for sock in (first, second)]
        shell = f'exec 3<&{first.fileno()} 4<&{second.fileno()}; exec "$@"'
        done = subprocess.run(
            ["bash", "-c", shell, "bash", sys.executable, "-c", RECEIVE],
            check=True,
            env=os.environ | {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
            pass_fds=[first.fileno(), second.fileno()],
            capture_output=True,
            text=True,
        )
    assert done.stdout.splitlines() == [f"{ports[0]} {ports[1]}", "False False", "[]"]


@pytest.mark.parametrize("kind", ["no socket", "a datagram", "a connection", "nothing"])
def test_what_nobody_can_connect_to_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection, other = socket.socketpair()
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    reading, writing = os.pipe()
    passed = {"no socket": reading, "a datagram": datagram.fileno(), "a connection": connection.fileno()}
    descriptor = os.dup(passed.get(kind, reading))
    if kind == "nothing":
        os.close(descriptor)
    monkeypatch.setattr(systemd, "_FIRST_FD", descriptor)
    with connection, other, datagram, pytest.raises(ConfigError, match="needs ListenStream=, Accept=no"):
        inherited_sockets({"LISTEN_PID": ME, "LISTEN_FDS": "1"})
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": ME},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": ME, "LISTEN_FDS": "x"},
        {"LISTEN_PID": ME, "LISTEN_FDS": "-1"},
        {"LISTEN_PID": ME, "LISTEN_FDS": "0"},
    ],
)
def test_sockets_that_are_not_for_us(environ: dict[str, str]) -> None:
    """And the variables go, so that no child believes in them."""
    environ = environ | {"OTHER": "stays"}
    assert inherited_sockets(environ) == []
    assert environ == {"OTHER": "stays"}


@pytest.mark.parametrize("abstract", [False, True])
def test_reports_arrive(abstract: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="notify-") as folder:
        name = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(f"\0{name}" if abstract else name)
            receiver.settimeout(10)
            notify("READY=1", {"NOTIFY_SOCKET": f"@{name}" if abstract else name})
            assert receiver.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "/" + "x" * 200, "vsock:1:2"])
def test_nobody_listens(address: str) -> None:
    assert not Path("relative").exists()
    notify("READY=1", {"NOTIFY_SOCKET": address})
    notify("READY=1", {})


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ME}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_interval(environ) == seconds
