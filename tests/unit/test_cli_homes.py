"""Whoever has a home that is not theirs to look into, or none, is served all the same."""

from __future__ import annotations

import pwd
from typing import TYPE_CHECKING

import pytest

from cachesrv.cli import run
from cachesrv.errors import ConfigError
from cachesrv.push import settings
from cachesrv.push.pushed import open_pushed
from cachesrv.push.settings import Given, find_settings

if TYPE_CHECKING:
    from pathlib import Path

UNSEEN = f"/{'h' * 300}"
"""What is in it cannot be known: the system refuses to look, for root too."""
CACHE = "http://127.0.0.1:9/main"


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHESRV_TOKEN", "CACHESRV_URL", "CACHESRV_DATA_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings, "SYSTEM_NETRC", tmp_path / "netrc")
    monkeypatch.setenv("NIX_REMOTE", str(tmp_path))
    monkeypatch.setenv("HOME", UNSEEN)


def test_a_home_that_cannot_be_looked_into_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = find_settings(Given(CACHE), {"HOME": UNSEEN})
    assert (found.address.url, found.token.read()) == (CACHE, None)
    with open_pushed({"HOME": UNSEEN}) as pushed:
        assert list(pushed.paths()) == []
    assert run(["pushed"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (
            ["push", "./result"],
            2,
            "cachesrv: which cache? give its URL (--to for pushes), set CACHESRV_URL, or write it to ",
        ),
        (["queue", "status", "--queue", UNSEEN], 1, f"cachesrv: the queue {UNSEEN} cannot be read: File name too long"),
        (["serve"], 2, f"cachesrv: the data directory {UNSEEN}/.local/state/cachesrv cannot be made: "),
        (["gc"], 2, f"cachesrv: the data directory {UNSEEN}/.local/state/cachesrv cannot be read: "),
    ],
)
def test_what_cannot_be_done_without_one_is_told(
    arguments: list[str], status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == status
    assert capsys.readouterr().err.startswith(told)


def test_a_user_whom_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    assert find_settings(Given(CACHE), {}).address.url == CACHE

    folder = tmp_path / "cachesrv"
    folder.mkdir()
    (folder / "client.toml").write_text('token_file = "~/token"')
    with pytest.raises(ConfigError, match="token_file = '~/token': Could not determine home directory"):
        find_settings(Given(CACHE), {"XDG_CONFIG_HOME": str(tmp_path)})
