"""`cachesrv queue status` where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.push.queue.entries import Entries, Entry
from cachesrv.push.queue.queue_file import FILE
from cachesrv.push.queue.status import read_status
from tests.push_doubles import store_path

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
ONE = Entry(store_path("one").full("/nix/store"), queued=1.0)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")


@pytest.fixture
def queue() -> Iterator[Path]:
    """Which all may read."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are below a private one
        Path(folder).chmod(0o755)
        yield Path(folder)


def status_for_others(queue: Path) -> subprocess.CompletedProcess[str]:
    program = f"""if True:
        import os, sys
        from cachesrv.errors import StoreError
        from cachesrv.push.queue.status import read_status
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
        try:
            print(read_status(sys.argv[1]).waiting)
        except StoreError as error:
            sys.exit(str(error))
        """
    for file in queue.iterdir():
        file.chmod(0o644)
    command = [sys.executable, "-c", program, str(queue)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_root
def test_of_a_queue_that_nobody_has_open(queue: Path) -> None:
    with closing(Entries.open(str(queue))) as entries:
        entries.add([ONE])
    assert {file.name for file in queue.iterdir()} == {FILE}
    assert status_for_others(queue).stdout == "1\n"


@needs_root
def test_of_a_queue_that_is_being_pushed(queue: Path) -> None:
    with closing(Entries.open(str(queue))) as entries:
        entries.add([ONE])
        assert status_for_others(queue).stdout == "1\n"


@needs_root
def test_what_may_be_missing_is_not_passed_over(queue: Path) -> None:
    """The log of a process that was killed cannot be read without writing its index."""
    with closing(Entries.open(str(queue))) as entries:
        entries.add([ONE])
        log = Path(f"{queue / FILE}-wal").read_bytes()
    Path(f"{queue / FILE}-wal").write_bytes(log)
    done = status_for_others(queue)
    assert done.returncode == 1
    assert done.stderr.startswith(f"the queue {queue / FILE} cannot be used: ")


def test_it_waits_for_no_writer(queue: Path) -> None:
    with closing(Entries.open(str(queue))) as entries:
        entries.add([ONE])
        with entries._file.transaction() as db:
            db.execute("DELETE FROM entries")
            assert read_status(str(queue)).waiting == 1


def test_of_a_queue_that_is_just_being_made(queue: Path) -> None:
    (queue / FILE).touch()
    assert read_status(str(queue)).waiting == 0
    assert (queue / FILE).stat().st_size == 0
