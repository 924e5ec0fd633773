"""The hook: what it writes, how safely, and that nothing that goes wrong with it fails a build."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cachesrv
from cachesrv.push.queue import spool
from cachesrv.push.queue.directory import SYSTEM_QUEUE, queue_directory
from cachesrv.push.queue.spool import put

if TYPE_CHECKING:
    from collections.abc import Callable

ONE, TWO = f"/nix/store/{'1' * 32}-one", f"/nix/store/{'2' * 32}-two"
DRV = f"/nix/store/{'3' * 32}-one.drv"

ROOT = Path(cachesrv.__file__).parent.parent


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    return tmp_path / "state" / "queue"


def hook(
    queue: Path, *arguments: str, before: Callable[[], object] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "CACHESRV_QUEUE_DIR": str(queue), **variables}
    return subprocess.run(
        [sys.executable, "-m", "cachesrv", "hook", *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=before,
    )


def queued(queue: Path) -> list[str]:
    return [file.read_text() for file in sorted((queue / "incoming").iterdir())]


def test_outputs_and_derivation_are_written_down(queue: Path) -> None:
    done = hook(queue, OUT_PATHS=f"{ONE} {TWO}", DRV_PATH=DRV)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert queued(queue) == [f"drv {DRV}\nout {ONE}\nout {TWO}\n"]


def test_the_derivation_stands_for_outputs_that_are_not_named(queue: Path) -> None:
    assert hook(queue, OUT_PATHS="", DRV_PATH=DRV).stderr == ""

    assert queued(queue) == [f"drv {DRV}\n"]


def test_the_option_says_where(queue: Path, tmp_path: Path) -> None:
    assert hook(queue, "--queue", str(tmp_path / "other"), OUT_PATHS=ONE).returncode == 0

    assert queued(tmp_path / "other") == [f"out {ONE}\n"]
    assert not queue.exists()


@pytest.mark.parametrize("umask", [0, 0o477])
def test_its_owner_can_read_it_and_nobody_else_whatever_the_umask(queue: Path, umask: int) -> None:
    hook(queue, OUT_PATHS=ONE, before=lambda: os.umask(umask))

    [file] = (queue / "incoming").iterdir()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (queue, queue / "incoming", file)]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write in the name of others")
def test_what_root_queues_belongs_to_the_owner_of_the_queue(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12346)

    hook(home / "state" / "queue", OUT_PATHS=ONE)

    made = [home / "state", *(home / "state").rglob("*")]
    assert len(made) == 4
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12346)}


def test_files_are_on_disk_before_they_have_their_name(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(queue), [ONE.encode()])
    steps: list[str] = []

    def note(name: str) -> None:
        true = getattr(os, name)

        def call(*arguments: int, **options: int) -> None:
            kind = "directory" if name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "file"
            steps.append(f"{name} {kind}")
            true(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    note("fsync")
    note("rename")
    put(str(queue), [TWO.encode()])

    assert steps == ["fsync file", "rename file", "fsync directory"]


def test_names_are_in_order_of_age(queue: Path) -> None:
    for number in range(20):
        put(str(queue), [b"/%d" % number])

    assert queued(queue) == [f"out /{number}\n" for number in range(20)]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "nothing to queue"),
        ({"OUT_PATHS": "", "DRV_PATH": ""}, "nothing to queue"),
        ({"OUT_PATHS": "result", "DRV_PATH": DRV}, "not a store path in $OUT_PATHS: b'result'"),
        ({"OUT_PATHS": f"/{'x' * 5000}"}, "not a store path"),
        ({"OUT_PATHS": "/nix/\x1b[2J"}, r"not a store path in $OUT_PATHS: b'/nix/\x1b[2J'"),
        ({"OUT_PATHS": "/nix/\udcff"}, r"not a store path in $OUT_PATHS: b'/nix/\xff'"),
        ({"DRV_PATH": "x y"}, "nothing to queue"),
    ],
)
def test_garbage_is_told_and_fails_no_build(queue: Path, variables: dict[str, str], told: str) -> None:
    done = hook(queue, before=None, **variables)

    assert done.returncode == 0
    assert told in done.stderr
    assert not queue.exists()


def test_what_is_good_is_queued_beside_garbage(queue: Path) -> None:
    done = hook(queue, OUT_PATHS=f"result {ONE}")

    assert "b'result'" in done.stderr
    assert queued(queue) == [f"out {ONE}\n"]


def test_a_queue_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    done = hook(tmp_path / "file" / "queue", OUT_PATHS=f"{ONE} {TWO}")

    assert done.returncode == 0
    assert f"the queue {tmp_path}/file/queue cannot be written: Not a directory" in done.stderr
    assert f"nobody will push {ONE} {TWO}" in done.stderr


def test_no_room_is_told_and_leaves_nothing_behind(queue: Path) -> None:
    import resource  # noqa: PLC0415  of the one test that makes a disk small

    done = hook(queue, OUT_PATHS=ONE, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5)))

    assert done.returncode == 0
    assert f"the queue {queue} cannot be written: File too large" in done.stderr
    assert queued(queue) == []


def test_a_queue_that_is_relative_to_nothing_is_told(tmp_path: Path) -> None:
    def lose_working_directory() -> None:
        os.chdir(tmp_path)
        tmp_path.rmdir()

    done = hook(Path("queue"), OUT_PATHS=ONE, before=lose_working_directory)

    assert done.returncode == 0
    told = f"no queue: queue is relative, and the working directory is gone; nobody will push {ONE}"
    assert done.stderr == f"cachesrv hook: {told}\n"


def test_a_link_in_place_of_the_directory_is_not_followed(queue: Path, tmp_path: Path) -> None:
    queue.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (queue / "incoming").symlink_to(tmp_path / "elsewhere")

    assert f"the queue {queue} cannot be written" in hook(queue, OUT_PATHS=ONE).stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_defect_fails_no_build_either(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from cachesrv.push.queue import hook as module  # noqa: PLC0415  the name is that of a function here

    monkeypatch.setenv("OUT_PATHS", ONE)
    monkeypatch.setattr(module, "put", lambda *_: 1 // 0)

    module.hook("/nowhere")

    assert capfd.readouterr().err.startswith("cachesrv hook: defect, please report it: ZeroDivisionError")


def test_nobody_to_tell_is_no_failure(queue: Path) -> None:
    assert hook(queue, before=lambda: os.close(2)).returncode == 0


def test_only_a_wrong_command_line_is_a_failure(queue: Path) -> None:
    assert hook(queue, "--nonsense", OUT_PATHS=ONE).returncode == 2
    assert hook(queue, "--help").stdout.startswith("Usage: cachesrv hook")
    assert not queue.exists()


def test_it_is_reached_by_all_other_ways_to_say_it(queue: Path, tmp_path: Path) -> None:
    assert hook(queue, f"--queue={tmp_path / 'other'}", OUT_PATHS=ONE).returncode == 0

    assert queued(tmp_path / "other") == [f"out {ONE}\n"]


def test_next_to_nothing_is_imported(queue: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); sys.argv = ['cachesrv', 'hook']\n"
        "from cachesrv.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        check=True,
        env={"PYTHONPATH": str(ROOT), "CACHESRV_QUEUE_DIR": str(queue), "OUT_PATHS": ONE},
        capture_output=True,
        text=True,
    )

    assert queued(queue) == [f"out {ONE}\n"]
    others = {name for name in done.stdout.split() if not name.startswith("cachesrv")}
    # os is there after site, which -S leaves out
    assert others <= {"__future__", "os", "os.path", "posixpath", "genericpath", "stat", "_stat", "_collections_abc"}


def test_programs_that_are_installed_are_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"cachesrv", "cachesrv-hook"}
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))


def test_a_fifo_is_woken(queue: Path) -> None:
    queue.mkdir(parents=True)
    os.mkfifo(queue / "wake")
    spool.wake(str(queue))  # nobody reads: nobody to wake
    reader = os.open(queue / "wake", os.O_RDONLY | os.O_NONBLOCK)
    hook(queue, OUT_PATHS=ONE)

    assert os.read(reader, 10) == b"\n"
    os.close(reader)


def test_nothing_but_a_fifo_is_woken(queue: Path) -> None:
    put(str(queue), [])
    (queue / "wake").write_text("precious")
    spool.wake(str(queue))

    assert (queue / "wake").read_text() == "precious"


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ("there", {"CACHESRV_QUEUE_DIR": "/q"}, str(Path.cwd() / "there")),
        (None, {"CACHESRV_QUEUE_DIR": "/q", "HOME": "/h"}, "/q"),
        (None, {"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/cachesrv/queue"),
        (None, {"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/cachesrv/queue"),
    ],
)
def test_where_the_queue_of_a_user_lies(
    given: str | None, environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert queue_directory(given, environ) == expected


def test_root_has_one_queue_whatever_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    assert queue_directory(None, {"HOME": "/home/somebody"}) == queue_directory(None, {}) == SYSTEM_QUEUE


def test_without_a_home_it_is_told_and_fails_no_build(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from cachesrv.push.queue.hook import hook as queue_outputs  # noqa: PLC0415  see above

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for name in ("CACHESRV_QUEUE_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUT_PATHS", ONE)
    queue_outputs()

    assert "no queue: give --queue" in capfd.readouterr().err
