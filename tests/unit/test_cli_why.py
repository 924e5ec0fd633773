"""`cachesrv why` on real stores."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from cachesrv.cli import run
from tests.offline import DAY, OfflineServer
from tests.samples import Sample

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path,))
_CONFIG = "[[cache]]\nname = 'main'\nretention_age = '90 d'\n"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def server(tmp_path: Path) -> OfflineServer:
    server = OfflineServer(tmp_path, _CONFIG)
    server.push(LIBRARY, TOOL)
    return server


def test_for_people(server: OfflineServer, capsys: Capture) -> None:
    server.said(capsys, "pin", "add", "release", TOOL.path.base_name)
    server.pass_time(91 * DAY)
    lines = server.said(capsys, "why", LIBRARY.path.full("/nix/store")).splitlines()
    assert lines[0].startswith(f"{LIBRARY.path.base_name} was published 20")
    assert lines[-1] == "kept by the pin release: tool -> library"
    server.said(capsys, "pin", "remove", "release")
    assert "nothing keeps it" in server.said(capsys, "why", LIBRARY.path.base_name)
    server.said(capsys, "gc")
    assert "was removed 20" in server.said(capsys, "why", LIBRARY.path.base_name, status=1)


def test_for_programs(server: OfflineServer, capsys: Capture) -> None:
    (told,) = server.told(capsys, "why", LIBRARY.path.base_name)
    assert (told["cache"], told["hash_part"]) == ("main", LIBRARY.path.hash_part)
    assert (told["state"], told["kept"]) == ("published", True)
    assert [reason["kind"] for reason in told["reasons"]] == ["publication", "use", "use", "policy"]
    (told,) = server.told(capsys, "why", "0" * 32, status=1)
    assert (told["state"], told["kept"]) == ("unknown", False)


def test_a_path_that_the_catalog_has_lost(server: OfflineServer, capsys: Capture) -> None:
    server.data.catalog.unlink()
    never, stored = server.said(capsys, "why", LIBRARY.path.base_name, status=1).splitlines()
    assert "was never pushed to main, as far as that is remembered" in never
    assert stored.startswith("it lies in the storage of main, and the catalog does not know it: ")
    (told,) = server.told(capsys, "why", LIBRARY.path.base_name, status=1)
    assert (told["state"], [reason["kind"] for reason in told["reasons"]]) == ("unknown", ["unknown", "storage"])


def test_what_others_wrote_is_there(server: OfflineServer, capsys: Capture) -> None:
    server.data.catalog.unlink()
    server.configure("[[cache]]\nname = 'main'\nauthority = 'bucket'\n")
    assert "where others write to main" in server.said(capsys, "why", LIBRARY.path.base_name)
    (told,) = server.told(capsys, "why", LIBRARY.path.base_name)
    assert (told["state"], told["kept"]) == ("published", True)


def test_storage_that_cannot_be_asked(server: OfflineServer, capsys: Capture) -> None:
    shutil.rmtree(server.data.objects)
    server.data.objects.write_text("not a folder")
    assert "cannot be told" in server.said(capsys, "why", "0" * 32, status=1)


def test_what_cannot_be_a_path(server: OfflineServer, capsys: Capture) -> None:
    assert server.command("why", "/etc/passwd") == 1
    assert "/etc/passwd" in capsys.readouterr().err
    assert server.command("why", LIBRARY.path.base_name, "--cache", "mian") == 2


def test_help_has_an_example(capsys: Capture) -> None:
    assert run(["why", "--help"]) == 0
    assert "  cachesrv why ./result" in capsys.readouterr().out
