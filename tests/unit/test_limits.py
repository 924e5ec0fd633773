"""What is said where the kernel lets no more threads begin."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from cachesrv import limits
from cachesrv.services.data_directory import DataDirectory

if TYPE_CHECKING:
    from pathlib import Path

SOMEBODY = 54_321
"""A user who has no other processes."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--listen", "127.0.0.1:0", "--data-dir", "data"],
        ["serve", "--listen", "127.0.0.1:0", "--data-dir", "data", "--workers", "2"],
        ["verify", "--data-dir", "data"],
    ],
    ids=" ".join,
)
def test_commands_name_the_limit(tmp_path: Path, arguments: list[str], tasks: int) -> None:
    """In a process of its own; files stay those of root, whoever it is."""
    program = f"""if True:
        import ctypes, os, resource, sys
        from cachesrv.cli import run
        resource.setrlimit(resource.RLIMIT_NPROC, ({tasks}, {tasks}))
        os.setresuid({SOMEBODY}, {SOMEBODY}, 0)
        ctypes.CDLL(None).setfsuid(0)
        sys.exit(run(sys.argv[1:]))
        """
    data = DataDirectory(tmp_path / "data")
    data.make()
    data.token()
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("cachesrv: no thread could be started: raise the limit of tasks, or have fewer run (")
    assert f"ulimit -u, LimitNPROC: {tasks} of this user" in said


def test_what_python_says_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of the real exception: a stack of this size cannot be had."""
    before = threading.stack_size(2**46)
    try:
        with pytest.raises(RuntimeError) as caught:
            threading.Thread(target=print).start()
    finally:
        threading.stack_size(before)
    told = limits.no_thread(caught.value)
    assert told
    assert told.startswith("no thread could be started")
    monkeypatch.setattr(limits, "_NO_THREAD", "something else")
    assert limits.no_thread(caught.value) is None


def test_limits_of_control_groups_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.slice" / "b.service").mkdir(parents=True)
    (tmp_path / "a.slice" / "pids.max").write_text("70\n")
    (tmp_path / "a.slice" / "b.service" / "pids.max").write_text("max\n")
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere\n0::/a.slice/b.service\n")
    monkeypatch.setattr(limits, "_HIERARCHIES", {"": str(tmp_path)})
    monkeypatch.setattr(limits, "_MEMBERSHIP", tmp_path / "cgroup")
    told = limits.no_thread(RuntimeError("can't start new thread"))
    assert told
    assert "TasksMax, pids.max: 70 in /a.slice" in told


def test_other_errors_are_not_its_business() -> None:
    assert limits.no_thread(RuntimeError("this event loop is already running")) is None
    assert limits.no_thread(ValueError("can't start new thread")) is None
