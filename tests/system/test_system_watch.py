"""Paths of a store are pushed as they become valid: by a service, and while a command runs."""

from __future__ import annotations

import os
import pty
import signal
import sqlite3
import subprocess
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from tests.system.nix import CHAIN
from tests.system.queues import Queue, published
from tests.system.server import CACHESRV, PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.nix import Nix
    from tests.system.server import Server


def names(server: Server) -> set[str]:
    return {path.partition("-")[2] for path in published(server)}


def is_published(server: Server, *expected: str) -> None:
    until(lambda: names(server) == set(expected), f"{names(server)} is there, not {expected}")


def begins(queue: Queue) -> None:
    """Wait until what becomes valid is seen."""
    file = queue.directory / "queue.sqlite"

    def has_begun() -> bool:
        if not file.exists():
            return False
        with closing(sqlite3.connect(file)) as db, suppress(sqlite3.OperationalError):  # it is being made
            return bool(db.execute("select 1 from facts where name like 'registered in %'").fetchone())
        return False

    until(has_begun, "it does not begin")


def test_what_becomes_valid_arrives(builder: Nix, cache: Server) -> None:
    builder.add("before", "before")
    queue = Queue(builder, cache)
    with queue.runs(name="watch-store") as service:
        begins(queue)
        builder.build(CHAIN, "tool")
        is_published(cache, "library", "tool")
        service.process.kill()
        service.process.wait(PATIENCE)
    builder.build(CHAIN, "program")
    with queue.runs(name="watch-store"):
        is_published(cache, "library", "tool", "program")


def test_derivations_arrive_if_asked_for(builder: Nix, cache: Server) -> None:
    builder.add("before", "before")
    queue = Queue(builder, cache)
    with queue.runs("--derivations", name="watch-store"):
        begins(queue)
        builder.build(CHAIN, "library")
        is_published(cache, "library", "library.drv")


def test_it_pushes_what_hooks_queue_as_well(nix: Nix, server: Server) -> None:
    before = nix.add("before", "before")
    queue = Queue(nix, server)
    with queue.runs(name="watch-store"):
        begins(queue)
        assert queue.says("retry").returncode == 0
        subprocess.run([*CACHESRV, "hook"], check=True, env=queue.environment | {"OUT_PATHS": before})
        is_published(server, "before")


def test_a_store_without_a_database_is_told(nix: Nix, server: Server) -> None:
    done = watch_exec(Queue(nix, server), "true")

    assert done.returncode == 1
    assert "there is no Nix store with a database at" in done.stderr


def watch_exec(queue: Queue, *words: str, err: int | IO[str] = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        queue.command("watch-exec", "--", *words),
        check=False,
        env=queue.environment,
        stdout=subprocess.PIPE,
        stderr=err,
        text=True,
        timeout=PATIENCE,
    )


def test_what_a_command_builds_has_arrived_when_it_ends(builder: Nix, cache: Server, client: Nix) -> None:
    builder.add("before", "before")
    (builder.folder / "default.nix").write_text(CHAIN)

    done = watch_exec(
        Queue(builder, cache), "nix-build", str(builder.folder / "default.nix"), "-A", "program", "--no-out-link"
    )

    assert done.returncode == 0, done.stderr
    assert names(cache) == {"library", "tool", "program"}
    program = done.stdout.strip()
    assert client.run("nix-store", "--realise", program) == program


@pytest.mark.parametrize(
    ("script", "status"),
    [("echo out; echo err >&2; exit 3", 3), ("echo out; echo err >&2; kill -9 $$", 137)],
)
def test_output_and_exit_status_are_those_of_the_command(nix: Nix, server: Server, script: str, status: int) -> None:
    nix.add("before", "before")
    done = watch_exec(Queue(nix, server), "sh", "-c", script)

    assert (done.returncode, done.stdout, done.stderr) == (status, "out\n", "err\n")


def test_nobody_reads_what_is_told(nix: Nix, server: Server) -> None:
    nix.add("before", "before")
    (nix.folder / "new").write_text("new")
    script = f"nix-store --store {nix.store} --add {nix.folder}/new; exit 3"

    with Path("/dev/full").open("w") as full:
        done = watch_exec(Queue(nix, server), "sh", "-c", script, err=full)

    assert done.returncode == 3
    assert names(server) == {"new"}


def test_a_command_may_remove_all_that_is_temporary(nix: Nix, server: Server) -> None:
    nix.add("before", "before")
    (nix.folder / "new").write_text("new")
    queue = Queue(nix, server)
    queue.environment["TMPDIR"] = str(nix.folder / "temporary")
    (nix.folder / "temporary").mkdir()
    script = f"rm -r {nix.folder}/temporary; nix-store --store {nix.store} --add {nix.folder}/new; exit 3"

    done = watch_exec(queue, "sh", "-c", script)

    assert done.returncode == 3, done.stderr
    assert names(server) == {"new"}


def test_commands_that_cannot_be_started(nix: Nix, server: Server) -> None:
    nix.add("before", "before")
    queue = Queue(nix, server)

    done = watch_exec(queue, "no-such-command")
    assert (done.returncode, done.stderr) == (127, "cachesrv: no-such-command: No such file or directory\n")
    assert watch_exec(queue, str(nix.folder)).returncode == 126
    assert watch_exec(queue).returncode == 2


def test_what_cannot_be_pushed_is_told_and_changes_no_status(nix: Nix, server: Server) -> None:
    nix.add("before", "before")
    server.token_file.write_text("nonsense\n")
    (nix.folder / "new").write_text("new")

    done = watch_exec(Queue(nix, server), "nix-store", "--store", nix.store, "--add", str(nix.folder / "new"))

    assert done.returncode == 0
    assert "does not accept the token" in done.stderr
    assert f"cachesrv: not pushed: {done.stdout.strip()}" in done.stderr
    assert published(server) == set()


@contextmanager
def running(queue: Queue, script: str, terminal: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A script of the shell below watch-exec, that has said that it is ready."""
    process = subprocess.Popen(
        ["setsid", *(["--ctty"] if terminal else []), *queue.command("watch-exec", "--", "sh", "-c", script)],
        env=queue.environment,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate(timeout=PATIENCE)


SLOW = "trap 'echo {0}; {1}' {0}; echo ready; while :; do sleep 0.02; done"


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "USR1"])
def test_signals_go_to_the_command(nix: Nix, server: Server, name: str) -> None:
    nix.add("before", "before")
    with running(Queue(nix, server), SLOW.format(name, "exit 7")) as process:
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert process.wait(PATIENCE) == 7
        assert process.stdout is not None
        assert process.stdout.read() == f"{name}\n"


def test_the_terminal_tells_the_command_itself(nix: Nix, server: Server) -> None:
    """Once, and not by us as well; what it built is pushed all the same."""
    nix.add("before", "before")
    (nix.folder / "new").write_text("new")
    keys, terminal = pty.openpty()
    script = f"nix-store --store {nix.store} --add {nix.folder}/new >&2; " + SLOW.format("INT", "sleep 0.2; exit 130")
    with running(Queue(nix, server), script, terminal) as process:
        os.write(keys, b"\x03")
        assert process.wait(PATIENCE) == 130
        assert process.stdout is not None
        assert process.stdout.read() == "INT\n"
    assert names(server) == {"new"}
    os.close(keys)
    os.close(terminal)


def test_twice_ends_at_once(nix: Nix, server: Server) -> None:
    nix.add("before", "before")
    with running(Queue(nix, server), SLOW.format("INT", ":")) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "INT\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


def test_twice_ends_the_pushing_at_once_too(nix: Nix, server: Server) -> None:
    """The command has ended, the server hangs."""
    nix.add("before", "before")
    (nix.folder / "new").write_text("new")
    script = f"echo ready; echo $$; nix-store --store {nix.store} --add {nix.folder}/new >&2; exit 5"
    server.signal(signal.SIGSTOP)
    with running(Queue(nix, server), script) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        command = Path("/proc", process.stdout.readline().strip())
        until(lambda: not command.exists(), "the command does not end")
        process.send_signal(signal.SIGINT)
        assert any("once more to end at once" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 5
        assert "cachesrv: not pushed: /nix/store/" in process.stderr.read()
    server.signal(signal.SIGCONT)
