"""`cachesrv queue` as people meet it: which paths are meant, what is said of them, and what help says."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from cachesrv.cli import run
from cachesrv.errors import StoreError
from cachesrv.push.queue.directory import make_private
from cachesrv.push.queue.entries import Entries, Entry
from cachesrv.push.queue.execution import Execution
from cachesrv.push.queue.pusher import Way
from cachesrv.push.queue.registered import Registered
from cachesrv.push.queue.report import LogReport
from cachesrv.push.queue.status import Status, read_status, status_lines
from cachesrv.push.run import Options
from cachesrv.push.settings import Given
from cachesrv.push.store_location import locate
from tests.push_doubles import store_path

if TYPE_CHECKING:
    from pathlib import Path

ONE, TWO = (store_path(name).full("/nix/store") for name in ("one", "two"))


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which two paths have failed."""
    directory = str(tmp_path / "queue")
    monkeypatch.setenv("CACHESRV_QUEUE_DIR", directory)
    monkeypatch.setenv("NIX_REMOTE", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    make_private(directory)
    with closing(Entries.open(directory)) as entries:
        entries.add([Entry(ONE), Entry(TWO)])
        entries.failed({Entry(path): ("no", time.time() + 3600) for path in (ONE, TWO)})
    return directory


def due(queue: str) -> set[str]:
    """What is to be tried again at once."""
    return {one.path for one in read_status(queue).failed_paths if not one.next_try}


def test_what_a_killed_process_had_in_flight_is_not(queue: str) -> None:
    three = Entry(store_path("three").full("/nix/store"))
    with closing(Entries.open(queue)) as entries:
        entries.add([three])
        entries.claim([three, Entry(TWO)])
    status = read_status(queue)

    assert (status.waiting, status.in_flight, status.failed) == (1, 0, 2)
    assert (status.in_flight_paths, [one.path for one in status.failed_paths]) == ([], [ONE, TWO])


def test_retry_takes_what_leads_to_a_path(queue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result").symlink_to(TWO)

    assert run(["queue", "retry", "./result"]) == 0
    assert (due(queue), capsys.readouterr().out) == ({TWO}, "1 path to be tried again\n")
    assert run(["queue", "retry", ONE]) == 0
    assert due(queue) == {ONE, TWO}


def test_retry_of_nothing_named_is_of_all(queue: str) -> None:
    assert run(["queue", "retry"]) == 0
    assert due(queue) == {ONE, TWO}


def test_retry_names_what_has_not_failed(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = store_path("other").full("/nix/store")

    assert run(["queue", "retry", other, "nonsense"]) == 3
    out, err = capsys.readouterr()
    assert (due(queue), out) == (set(), "0 paths to be tried again\n")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"failed {other}", "failed nonsense"]
    assert run(["queue", "retry", other, ONE]) == 3
    assert due(queue) == {ONE}


def test_what_is_given_up_is_forgotten(queue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result").symlink_to(TWO)

    assert run(["queue", "forget", "./result"]) == 0
    assert capsys.readouterr().out == "1 path forgotten\n"
    assert [one.path for one in read_status(queue).failed_paths] == [ONE]
    assert run(["queue", "forget", TWO, ONE]) == 3
    assert read_status(queue).failed_paths == []
    assert capsys.readouterr().err.startswith(f"failed {TWO}: it is not among what has failed")


def test_only_what_has_failed_is_given_up(queue: str) -> None:
    three = Entry(store_path("three").full("/nix/store"))
    with closing(Entries.open(queue)) as entries:
        entries.add([three])
        entries.claim([Entry(TWO)])

        assert entries.forget([ONE, TWO, three.path]) == 1
        assert [one.path for one in entries.those_claimed()] == [TWO]
        assert entries.counts().waiting == 1


@pytest.mark.parametrize("arguments", [["retry"], ["retry", ONE], ["forget", ONE], ["status"]])
def test_a_queue_that_cannot_be_looked_at_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", *arguments, "--queue", f"/{'q' * 300}"]) == 1
    assert capsys.readouterr().err.endswith(": File name too long\n")


def test_a_drain_tells_its_troubles_on_stderr(queue: str, tmp_path: Path) -> None:
    (tmp_path / "queue/incoming/directory").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "cachesrv", "queue", "drain", "--to", "http://127.0.0.1:9/main"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "what a hook wrote cannot be read" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("cachesrv: there is no Nix store with a database at ")


@pytest.mark.parametrize("command", ["run", "status", "retry", "forget", "drain"])
def test_help_says_where_the_queue_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", command, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "/var/lib/cachesrv-queue for root" in help_text.partition("see below")[2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 seconds"),
        (1, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7200, "2 hours"),
        (200_000, "2 days"),
    ],
)
def test_ages_are_for_people(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    lines = status_lines(Status(oldest=1_000_000.0 - seconds))
    assert any(line.startswith("oldest ") and line.endswith(f", {text} ago") for line in lines)


def test_a_command_whose_queue_finds_no_place_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(None, Given("http://127.0.0.1:9/main"), Options(), {"HOME": str(tmp_path)})
    source = Registered(locate(str(tmp_path), {}))
    execution = Execution(["touch", str(tmp_path / "started")], source, way, LogReport(), io.StringIO())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))

    with pytest.raises(StoreError, match=r"no directory can be made for the queue: No such file .*: set \$TMPDIR"):
        execution.run()
    assert not (tmp_path / "started").exists()
