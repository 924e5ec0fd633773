"""`cachesrv gc` on real stores."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from cachesrv import wiring
from cachesrv.cli import run
from cachesrv.services.maintenance import maintenance
from tests.offline import DAY, OfflineServer
from tests.samples import Sample

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.web.site import Services

LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path,))
OTHER = Sample("other", b"other")

_CONFIG = """
[collect]
nar_grace = "10 d"
[[cache]]
name = "main"
retention_age = "90 d"
[[cache]]
name = "team"
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def server(tmp_path: Path) -> OfflineServer:
    """Two caches, of which one keeps everything."""
    server = OfflineServer(tmp_path, _CONFIG)
    server.push(LIBRARY, TOOL)
    server.push(OTHER, cache="team")
    server.pass_time(91 * DAY)
    server.push(OTHER)
    return server


def test_a_rehearsal_says_what_would_go_and_why_and_changes_nothing(server: OfflineServer, capsys: Capture) -> None:
    before = server.objects()
    lines = server.said(capsys, "gc", "--dry-run").splitlines()
    assert lines[0].startswith(f"main: {TOOL.path.base_name}, {len(TOOL.file)} bytes: not used for more than")
    assert "retention_age = 90 d, last used 20" in lines[0]
    assert lines[1].startswith(f"main: {LIBRARY.path.base_name}, ")
    size = len(TOOL.file) + len(LIBRARY.file)
    assert lines[2:] == [
        f"paths: 2 would go; their NARs, {size} bytes, stay for 10 d",
        "NARs: 0 would be deleted, which gives 0 bytes back",
        "all paths stay where there is no retention_age and no retention_size: in team",
    ]
    assert server.names() == {"library", "tool", "other"}
    assert server.objects() == before


def test_paths_go_at_once_and_their_nars_after_the_grace(server: OfflineServer, capsys: Capture) -> None:
    assert server.said(capsys, "gc").splitlines()[0].startswith("paths: 2 have gone; their NARs, ")
    assert server.names() == {"other"}
    assert {f"nar/{sample.nar_name}" for sample in (LIBRARY, TOOL, OTHER)} < server.objects()
    server.pass_time(10 * DAY + 1)
    lines = server.said(capsys, "gc", "--verbose").splitlines()
    assert lines[0].startswith(f"main/nar/{min(LIBRARY.nar_name, TOOL.nar_name)}, ")
    assert "needed by no path since 20" in lines[0]
    size = len(TOOL.file) + len(LIBRARY.file)
    assert f"NARs: 2 have been deleted, which gives {size} bytes back" in lines
    assert {name for name in server.objects() if name.startswith("nar/")} == {f"nar/{OTHER.nar_name}"}
    assert server.names("team") == {"other"}


def test_without_grace_if_that_is_asked_for(server: OfflineServer, capsys: Capture) -> None:
    lines = server.said(capsys, "gc", "--now").splitlines()
    size = len(TOOL.file) + len(LIBRARY.file)
    assert lines[:2] == [
        f"paths: 2 have gone; their NARs, {size} bytes, have gone at once",
        f"NARs: 2 have been deleted, which gives {size} bytes back",
    ]
    assert {name for name in server.objects() if name.startswith("nar/")} == {f"nar/{OTHER.nar_name}"}


def test_nars_that_a_push_may_rely_on_are_counted(server: OfflineServer, capsys: Capture) -> None:
    async def lease(services: Services) -> None:
        record = await services.catalog.nar(f"main/nar/{OTHER.nar_name}")
        assert record
        await services.catalog.put_nar(record, leased_until=int(time.time()) + DAY)

    server.use(lease)
    server.said(capsys, "delete", "other*", "--cache", "main")
    stays = f"NARs: 1, {len(OTHER.file)} bytes, stay until no push can rely on them: [collect] lease"
    assert stays in server.said(capsys, "gc", "--now", "--dry-run").splitlines()
    assert stays in server.said(capsys, "gc", "--now").splitlines()
    assert {name for name in server.objects() if name.startswith("nar/")} == {f"nar/{OTHER.nar_name}"}
    server.pass_time(2 * DAY)
    assert stays not in server.said(capsys, "gc", "--now").splitlines()
    assert not {name for name in server.objects() if name.startswith("nar/")}


def test_for_programs(server: OfflineServer, capsys: Capture) -> None:
    *paths, summary = server.told(capsys, "gc", "--dry-run")
    assert [path["path"] for path in paths] == [TOOL.path.base_name, LIBRARY.path.base_name]
    assert paths[0]["cache"] == "main"
    assert paths[0]["size"] == len(TOOL.file)
    assert paths[0]["used_at"] < time.time() - 91 * DAY + 60
    size = len(TOOL.file) + len(LIBRARY.file)
    sums = {"paths": 2, "path_bytes": size, "nars": 0, "nar_bytes": 0, "kept": 0, "leased": 0, "leased_bytes": 0}
    assert summary == {"event": "summary", "dry_run": True, "nar_grace": 10 * DAY, **sums}
    *_, nar, summary = server.told(capsys, "gc", "--now")
    assert (nar["event"], nar["size"]) == ("nar", len(LIBRARY.file))
    assert summary == {"event": "summary", "dry_run": False, "nar_grace": 0, **sums, "nars": 2, "nar_bytes": size}


def test_only_the_caches_that_are_named(server: OfflineServer, capsys: Capture) -> None:
    server.configure(_CONFIG + 'retention_age = "90 d"')
    server.said(capsys, "gc", "--now", "team")
    assert (server.names(), server.names("team")) == ({"library", "tool", "other"}, set())
    assert server.use(lambda services: services.catalog.noted("collected")) is None
    assert server.objects("team") <= {"nix-cache-info"}
    server.said(capsys, "gc", "--now", "team", "main")
    assert server.names() == {"other"}
    assert server.use(lambda services: services.catalog.noted("collected"))


def test_a_cache_that_is_not_there(server: OfflineServer, capsys: Capture) -> None:
    assert server.command("gc", "mian") == 2
    assert "no cache is called mian; there are main, team" in capsys.readouterr().err


def test_one_at_a_time(server: OfflineServer, capsys: Capture) -> None:
    async def busy() -> int:
        catalog = await wiring.open_catalog(server.config)
        try:
            async with maintenance(catalog):
                return await asyncio.to_thread(server.command, "gc")
        finally:
            await catalog.close()

    assert asyncio.run(busy()) == 1
    assert "is at it: collecting, deleting or repairing; try again later" in capsys.readouterr().err
    assert server.names() == {"library", "tool", "other"}


def test_what_the_schedule_starts_looks_whether_it_is_due(server: OfflineServer, capsys: Capture) -> None:
    (summary,) = server.told(capsys, "gc", "--scheduled")
    assert summary["paths"] == 2
    assert server.said(capsys, "gc", "--scheduled") == ""
    server.pass_time(DAY)
    (summary,) = server.told(capsys, "gc", "--scheduled")
    assert summary["paths"] == 0
    assert server.said(capsys, "gc", "--scheduled") == ""
    # the clock was days ahead, and was set right
    server.pass_time(-10 * DAY)
    assert server.told(capsys, "gc", "--scheduled")


def test_help_has_an_example(capsys: Capture) -> None:
    assert run(["gc", "--help"]) == 0
    assert "  cachesrv gc --dry-run" in capsys.readouterr().out


def test_a_mistyped_data_directory_is_not_made(tmp_path: Path, capsys: Capture) -> None:
    assert run(["gc", "--data-dir", str(tmp_path / "none")]) == 2
    assert "--data-dir" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
