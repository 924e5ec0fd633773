"""From builds by way of hooks and the queue into a cache, with whatever may come between."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cachesrv.push.queue.lock import QueueLock
from tests.system.nix import CHAIN
from tests.system.push import push
from tests.system.queues import Queue, published
from tests.system.server import PATIENCE, until

if TYPE_CHECKING:
    from tests.system.conftest import MakeNix
    from tests.system.nix import Nix
    from tests.system.server import Server

HOOKS = """
import os, sys
from cachesrv.push.queue.hook import hook
gate, paths = os.pipe(), sys.stdin.read().split()
for path in paths:
    if os.fork() == 0:
        os.close(gate[1])
        os.read(gate[0], 1)
        os.environ["OUT_PATHS"] = path
        hook()
        os._exit(0)
os.close(gate[1])
while paths:
    assert os.wait()[1] == 0
    paths.pop()
"""
"""A hook for each path that it reads, all at the same time."""


def many_paths(nix: Nix, number: int) -> list[str]:
    """Small paths in the store of a machine."""
    listed: list[str] = nix.evaluate(
        f'map (n: builtins.toFile "path-${{toString n}}" (toString n)) (builtins.genList (n: n) {number})'
    )
    return listed


def hooks_at_once(queue: Queue, paths: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOOKS],
        check=False,
        env=queue.environment,
        input="\n".join(paths),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")


def nars_stored(server: Server) -> int:
    match = re.search(r"^cachesrv_nars_stored_total (\S+)", server.client().get("/metrics").text, re.MULTILINE)
    assert match
    return int(float(match[1]))


def test_what_is_built_arrives(builder: Nix, cache: Server, client: Nix) -> None:
    queue = Queue(builder, cache)
    queue.install_hook()
    with queue.runs() as service:
        [program] = builder.build(CHAIN, "program")
        until(lambda: len(published(cache)) == 3, "it does not arrive")
        until(queue.is_empty, "it does not leave the queue")
        assert queue.is_pushed_by(service)
        # What is published leaves the queue before the push that it is part of is over.
        until(lambda: sum(line["queued"] for line in service.told("pushed")) == 3, "it is not told")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE) == 0
    assert queue.is_pushed_by(None)
    assert client.run("nix-store", "--realise", program) == program


def test_a_thousand_hooks_at_once_lose_nothing_and_upload_nothing_twice(nix: Nix, server: Server) -> None:
    paths = many_paths(nix, 1000)
    queue = Queue(nix, server)
    with queue.runs() as one:
        until(lambda: queue.is_pushed_by(one), "it does not start")
        with queue.runs() as other:
            other.until_told("another process pushes this queue: waiting for its end")
            hooks_at_once(queue, paths)
            until(queue.is_empty, "the queue does not become empty")

            assert published(server) == set(paths)
            assert nars_stored(server) == 1000
            until(lambda: sum(line["uploaded"] for line in one.told("pushed")) == 1000, "it is not told")
            assert other.told("pushed") == []

            one.process.kill()
            hooks_at_once(queue, [nix.add("late", "late")])
            other.until_told("pushed")


@pytest.mark.parametrize("after", [1, 60])
def test_killed_in_the_middle_it_goes_on(nix: Nix, server: Server, after: int) -> None:
    """After so many paths have been published."""
    paths = many_paths(nix, 200)
    queue = Queue(nix, server)
    hooks_at_once(queue, paths)
    with queue.runs("--jobs", "1") as service:
        until(lambda: len(published(server)) >= after, "nothing arrives")
        service.process.kill()
        service.process.wait(PATIENCE)
    with queue.runs():
        until(queue.is_empty, "the queue does not become empty")

    assert published(server) == set(paths)


def test_a_log_that_cannot_be_written_stops_nothing(nix: Nix, server: Server) -> None:
    queue = Queue(nix, server)
    hooks_at_once(queue, [nix.add("good", "good"), f"/nix/store/{'1' * 32}-gone"])

    with queue.runs("--idle", "0", by=("sh", "-c", 'exec "$@" 2> /dev/full', "sh")) as service:
        assert service.process.wait(PATIENCE) == 0

    assert queue.is_empty()
    assert len(published(server)) == 1


def test_started_by_a_hook_it_ends_when_all_is_done(nix: Nix, server: Server) -> None:
    """As systemd starts it, that waits for the FIFO to be written to."""
    path = nix.add("one", "one")
    queue = Queue(nix, server)
    queue.directory.mkdir(mode=0o700)
    os.mkfifo(queue.directory / "wake")
    fifo = os.open(queue.directory / "wake", os.O_RDWR | os.O_NONBLOCK)
    hooks_at_once(queue, [path])
    assert select.select([fifo], [], [], 0)[0]
    start = 'exec 3<>"$CACHESRV_QUEUE_DIR/wake"; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    name = f"cachesrv-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(PATIENCE)
        with queue.runs("--idle", "0.1", by=("bash", "-c", start, "bash"), NOTIFY_SOCKET=f"@{name}") as service:
            assert service.process.wait(PATIENCE) == 0
        assert systemd.recv(1000) == b"READY=1"

    assert published(server) == {path}
    assert not select.select([fifo], [], [], 0)[0]
    os.close(fifo)


def test_one_that_stands_by_is_ready_and_takes_over(nix: Nix, server: Server) -> None:
    queue = Queue(nix, server)
    name = f"cachesrv-{os.getpid()}"
    lock = QueueLock(str(queue.directory))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(PATIENCE)
        assert lock.take()
        path = nix.add("one", "one")
        hooks_at_once(queue, [path])
        with queue.runs(NOTIFY_SOCKET=f"@{name}", WATCHDOG_USEC="50000") as service:
            assert systemd.recv(1000) == b"READY=1\nSTATUS=Waiting for another process to end"
            assert systemd.recv(1000) == systemd.recv(1000) == b"WATCHDOG=1"
            assert published(server) == set()
            lock.close()
            until(lambda: published(server) == {path}, "it does not take over")
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(PATIENCE) == 0


def test_a_drain_pushes_all_and_says_what_it_could_not(nix: Nix, server: Server, make_nix: MakeNix) -> None:
    path = f"/nix/store/{'1' * 32}-differs"
    other = make_nix()
    other.plant(path, "here it is this")
    push(other, server, path)
    nix.plant(path, "and here it is that")
    good = nix.add("good", "good")
    queue = Queue(nix, server)
    hooks_at_once(queue, [path, good, f"/nix/store/{'2' * 32}-gone"])

    done = queue.drains()

    assert done.returncode == 3
    assert done.stderr.count(f"failed {path}: ") == done.stderr.count(path) == 1
    assert f"dropped: /nix/store/{'2' * 32}-gone: the store has it no more" in done.stderr
    assert published(server) == {path, good}
    status = queue.status
    assert [failed.path for failed in status.failed_paths] == [path]
    assert queue.says("retry", path).stdout == "1 path to be tried again\n"
    assert queue.says("retry", good).returncode == 3
    assert "next at once: " in queue.says("status").stdout
    assert json.loads(queue.says("status", "--json").stdout)["failed_paths"][0]["path"] == path


def test_a_drain_of_nothing_is_done(nix: Nix, server: Server) -> None:
    done = Queue(nix, server).drains()

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_drain_without_a_server_fails_and_keeps_all(nix: Nix, server: Server) -> None:
    queue = Queue(nix, server)
    hooks_at_once(queue, [nix.add("one", "one")])
    server.token_file.write_text("nonsense\n")

    done = queue.drains()

    assert done.returncode == 1
    assert "does not accept the token" in done.stderr
    assert queue.status.waiting == 1


def test_an_interrupted_service_ends_at_once(nix: Nix, server: Server) -> None:
    queue = Queue(nix, server)
    name = f"cachesrv-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(PATIENCE)
        with queue.runs(NOTIFY_SOCKET=f"@{name}") as service:
            assert systemd.recv(1000) == b"READY=1"
            service.process.send_signal(signal.SIGINT)
            assert service.process.wait(PATIENCE) == 130


def test_a_queue_that_is_not_there_is_empty(nix: Nix, server: Server) -> None:
    queue = Queue(nix, server)

    assert queue.is_empty()
    assert "pushed by  nobody" in queue.says("status").stdout
    assert queue.says("retry").stdout == "0 paths to be tried again\n"
    assert not queue.directory.exists()
