"""`cachesrv pin` on real stores."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.cli import run
from tests.offline import DAY, OfflineServer
from tests.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LIBRARY = Sample("library", b"library")
RELEASES = [Sample(f"release-{number}", b"%d" % number, (LIBRARY.path,)) for number in range(4)]

_CONFIG = """
[collect]
nar_grace = 0
[[cache]]
name = "main"
root = true
retention_age = "30 d"
[[cache]]
name = "team"
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def server(tmp_path: Path) -> OfflineServer:
    server = OfflineServer(tmp_path, _CONFIG)
    server.push(LIBRARY, *RELEASES)
    return server


def listed(server: OfflineServer, capsys: Capture, *arguments: str) -> dict[str, dict[str, Any]]:
    return {pin["name"]: pin for pin in server.told(capsys, "pin", "list", *arguments)}


def test_the_latest_generations_stay_with_all_that_they_need(server: OfflineServer, capsys: Capture) -> None:
    first, *others = RELEASES
    said = server.said(capsys, "pin", "add", "release", first.path.full("/nix/store"), "--keep", "2")
    assert said == f"release points to /nix/store/{first.path.base_name}\n"
    for release in others:
        server.said(capsys, "pin", "add", "release", release.path.base_name)
    pin = listed(server, capsys)["release"]
    assert (pin["keep"], pin["expires_at"]) == (2, None)
    assert [one["base_name"] for one in pin["generations"]] == [r.path.base_name for r in RELEASES[:1:-1]]
    server.pass_time(31 * DAY)
    server.said(capsys, "gc")
    assert server.names() == {"library", "release-2", "release-3"}
    assert server.said(capsys, "pin", "remove", "release") == ""
    server.said(capsys, "gc")
    assert server.names() == set()


def test_a_pin_that_expires(server: OfflineServer, capsys: Capture) -> None:
    server.said(capsys, "pin", "add", "preview", LIBRARY.path.hash_part, "--expires", "40d")
    ends = listed(server, capsys)["preview"]["expires_at"]
    assert abs(ends - time.time() - 40 * DAY) < 60
    server.said(capsys, "pin", "add", "preview", LIBRARY.path.hash_part, "--keep", "3")
    assert listed(server, capsys)["preview"]["expires_at"] == ends
    server.pass_time(39 * DAY)
    server.said(capsys, "gc")
    assert server.names() == {"library"}
    server.pass_time(2 * DAY)
    assert "preview: keeps 3, expired 20" in server.said(capsys, "pin", "list")
    assert server.command("pin", "add", "preview", LIBRARY.path.hash_part) == 2
    assert "preview expired 20" in capsys.readouterr().err
    server.said(capsys, "pin", "add", "preview", LIBRARY.path.hash_part, "--expires", "never")
    assert listed(server, capsys)["preview"]["expires_at"] is None
    server.said(capsys, "gc")
    assert server.names() == {"library"}


def test_the_list_is_for_people(server: OfflineServer, capsys: Capture) -> None:
    server.said(capsys, "pin", "add", "b", RELEASES[0].path.base_name, "--keep", "2")
    server.said(capsys, "pin", "add", "b", RELEASES[1].path.base_name)
    server.said(capsys, "pin", "add", "a", LIBRARY.path.base_name, "--expires", "1h")
    first, under_first, second, *under_second = server.said(capsys, "pin", "list").splitlines()
    assert first.startswith("a: keeps 1, expires 20")
    assert under_first.startswith(f"  {LIBRARY.path.base_name}  since 20")
    assert second == "b: keeps 2"
    assert [line.split()[0] for line in under_second] == [r.path.base_name for r in RELEASES[1::-1]]


def test_each_cache_has_its_own(server: OfflineServer, capsys: Capture) -> None:
    assert server.command("pin", "add", "release", LIBRARY.path.base_name, "--cache", "team") == 1
    assert f"{LIBRARY.path.base_name} is not in the cache team" in capsys.readouterr().err
    server.push(LIBRARY, cache="team")
    server.said(capsys, "pin", "add", "release", LIBRARY.path.base_name, "--cache", "team")
    assert listed(server, capsys) == {}
    assert list(listed(server, capsys, "--cache", "team")) == ["release"]
    assert server.command("pin", "list", "--cache", "mian") == 2
    server.configure(_CONFIG.replace("root = true", ""))
    assert server.command("pin", "list") == 2
    assert "which cache? say --cache; there are main, team" in capsys.readouterr().err


NAMES: dict[str, Callable[[Path], str]] = {
    "a link": str,
    "a name inside it": lambda link: f"{link}/bin/tool",
    "a store path": lambda _: LIBRARY.path.full("/nix/store"),
    "a name inside a store path": lambda _: f"{LIBRARY.path.full('/nix/store')}/bin/../lib",
    "a base name": lambda _: LIBRARY.path.base_name,
    "a hash part": lambda _: LIBRARY.path.hash_part,
}


@pytest.mark.parametrize("kind", NAMES)
def test_what_a_path_may_be_called(server: OfflineServer, tmp_path: Path, capsys: Capture, kind: str) -> None:
    link = tmp_path / "result"
    (tmp_path / "indirect").symlink_to(LIBRARY.path.full("/nix/store"))
    link.symlink_to("indirect")
    server.said(capsys, "pin", "add", "release", NAMES[kind](link))
    assert listed(server, capsys)["release"]["generations"][0]["base_name"] == LIBRARY.path.base_name


@pytest.mark.parametrize("wrong", ["/etc/passwd", "none", "/nix/store", "/nix/store/x", f"{'0' * 32}-absent"])
def test_what_is_no_path_of_the_cache(server: OfflineServer, capsys: Capture, wrong: str) -> None:
    assert server.command("pin", "add", "release", wrong) == 1
    assert wrong.removeprefix("/nix/store/") in capsys.readouterr().err
    assert listed(server, capsys) == {}


@pytest.mark.parametrize("name", ["", ".x", "a b", "a\nb", "ä", "x" * 201])
def test_names_that_no_pin_may_have(server: OfflineServer, name: str) -> None:
    assert server.command("pin", "add", name, LIBRARY.path.base_name) == 2


@pytest.mark.parametrize("options", [["--keep", "0"], ["--keep", "x"], ["--expires", "0"], ["--expires", "soon"]])
def test_wrong_options(server: OfflineServer, capsys: Capture, options: list[str]) -> None:
    assert server.command("pin", "add", "release", LIBRARY.path.base_name, *options) == 2
    assert options[0] in capsys.readouterr().err


def test_remove_what_is_not_there(server: OfflineServer, capsys: Capture) -> None:
    assert server.command("pin", "remove", "release") == 1
    assert "main has no pin release" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["add"], ["list"], ["remove"]])
def test_help_has_an_example(arguments: list[str], capsys: Capture) -> None:
    assert run(["pin", *arguments, "--help"]) == 0
    assert f"  cachesrv pin {' '.join(arguments)}" in capsys.readouterr().out.split("Example")[1]
