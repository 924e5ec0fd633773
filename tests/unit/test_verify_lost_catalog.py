"""`cachesrv verify` when the catalog was lost: it does not call well what it could not judge."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.offline import OfflineServer
from tests.samples import Sample

if TYPE_CHECKING:
    from pathlib import Path

TOOL = Sample("tool", b"tool")


@pytest.fixture
def server(tmp_path: Path) -> OfflineServer:
    server = OfflineServer(tmp_path)
    server.push(TOOL)
    server.data.catalog.unlink()
    for file in server.data.index.iterdir():
        file.unlink()
    return server


def test_what_is_young_is_counted(server: OfflineServer, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = server.said(capsys, "verify").splitlines()
    assert first == "paths looked at: 0; no flaws"
    assert second.startswith("  2 not judged: objects that the catalog does not know, younger than 1 h;")
    assert server.told(capsys, "verify")[-1]["young"] == 2


def test_what_is_old_is_found(server: OfflineServer, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (server.data.objects / "main").rglob("*"):
        os.utime(file, (time.time() - 3700, time.time() - 3700))
    told = server.told(capsys, "verify", status=3)
    assert (told[-1]["young"], told[-1]["flaws"]) == (0, {"unpublished-path": 1})
