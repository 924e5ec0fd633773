"""The units of systemd: what they say is understood by systemd, and by cachesrv."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import click
import pytest

from cachesrv.cli import run
from cachesrv.cli.queue import command
from cachesrv.push.queue import units as module
from cachesrv.push.queue.directory import SYSTEM_QUEUE
from cachesrv.push.queue.units import NAMES, units, unseen_folder

ROOT = Path(module.__file__).parents[3]
SPECIFIERS = {"%S": "/var/lib", "%t": "/run"}
"""Source: systemd.unit(5), Specifiers, of the system's manager."""

with_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")


def parsed(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.read_string(units()[name])
    return parser


def plain(text: str) -> str:
    for name, value in SPECIFIERS.items():
        text = text.replace(name, value)
    assert "%" not in text
    return text


def test_the_service_says_a_command_that_there_is() -> None:
    words = shlex.split(plain(parsed("cachesrv-queue.service")["Service"]["ExecStart"]))
    start = words.index("queue")

    assert Path(words[0]).exists()
    assert words[start + 1] == "run"
    assert isinstance(command, click.Group)
    context = command.make_context("queue", words[start + 1 :])
    given = command.commands["run"].make_context("run", words[start + 2 :], parent=context).params
    assert given["queue"] == SYSTEM_QUEUE
    assert str(given["token_file"]) == "${CREDENTIALS_DIRECTORY}/push-token"


def test_the_link_of_the_socket_is_where_hooks_look() -> None:
    assert plain(parsed("cachesrv-queue.socket")["Socket"]["Symlinks"]) == f"{SYSTEM_QUEUE}/wake"


def test_they_are_part_of_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cachesrv"]
    shipped = {file for pattern in patterns for file in (ROOT / "cachesrv").glob(pattern)}
    assert {ROOT / "cachesrv/push/queue/systemd" / name for name in NAMES} <= shipped


@with_systemd
def test_systemd_finds_nothing_wrong_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", "units", "--output", str(tmp_path)]) == 0
    files = capsys.readouterr().out.split()
    assert [Path(file).name for file in files] == list(NAMES)

    verified = _systemd_analyze("verify", "--man=no", *files)
    exposed = _systemd_analyze("security", "--offline=yes", "--threshold=20", files[0])

    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    assert exposed.returncode == 0, exposed.stdout[-200:]


def _systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], check=False, capture_output=True, text=True, timeout=60
    )


def test_they_can_be_read_by_all_whatever_the_umask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.umask(0o077)
    assert run(["queue", "units", "--output", str(tmp_path)]) == 0
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}
    assert "systemctl enable --now" in capsys.readouterr().err


def test_a_program_that_the_service_would_not_find_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:  # the folders of pytest are for one user alone
        folder = Path(name)
        folder.chmod(0o755)
        for_all, for_one, hidden = folder / "all", folder / "one", folder / "home"
        for made, mode in ((for_all, 0o755), (for_one, 0o700), (hidden, 0o755)):
            made.mkdir()
            made.chmod(mode)
            (made / "python").touch()
        (for_all / "link").symlink_to(for_one / "python")
        monkeypatch.setattr(module, "__file__", str(for_all / "units.py"))
        monkeypatch.setattr(module, "_HIDDEN", (hidden,))
        for program, unseen in (("all/python", None), ("one/python", for_one), ("home/python", hidden)):
            monkeypatch.setattr(sys, "executable", str(folder / program))
            assert unseen_folder() == unseen
        monkeypatch.setattr(sys, "executable", str(for_all / "link"))
        assert run(["queue", "units", "--output", name]) == 0

    assert f"But the service cannot look into {for_one}, where" in capsys.readouterr().err


def test_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", "units"]) == 0
    out = capsys.readouterr().out
    assert all(f"# ---- {name}\n" in out for name in NAMES)


@with_systemd
@pytest.mark.parametrize("name", ["plain", "a b", "100%", "$HOME"])
def test_systemd_finds_the_program_wherever_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert run(["queue", "units", "--output", str(tmp_path)]) == 0
    service = capsys.readouterr().out.split("\n")[0]

    verified = _systemd_analyze("verify", "--man=no", service)
    assert (verified.returncode, verified.stderr) == (0, "")
    (folder / "python").unlink()
    assert "is not executable: No such file" in _systemd_analyze("verify", "--man=no", service).stderr
