"""`cachesrv delete` on real stores."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cachesrv import wiring
from cachesrv.cli import delete, run
from cachesrv.services.deleting import Wish
from cachesrv.services.maintenance import maintenance
from cachesrv.services.removal_report import Silent
from tests.offline import DAY, OfflineServer
from tests.samples import Sample

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.services.deleting import Chosen
    from cachesrv.services.removal_report import Report
    from cachesrv.web.site import Services

LIBRARY = Sample("library-1.0", b"library")
TOOL = Sample("tool-1.0", b"tool", (LIBRARY.path,))
PROGRAM = Sample("program-2.0", b"program", (TOOL.path,))
TWIN = Sample("twin-2.0", b"tool")
ALL = (LIBRARY, TOOL, PROGRAM, TWIN)

_CONFIG = """
[collect]
nar_grace = "10 d"
[[cache]]
name = "main"
root = true
[[cache]]
name = "team"
[[cache]]
name = "shared"
prefix = "team"
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def server(tmp_path: Path) -> OfflineServer:
    server = OfflineServer(tmp_path, _CONFIG)
    server.push(*ALL)
    return server


def nars(server: OfflineServer, cache: str = "main") -> set[str]:
    return {name for name in server.objects(cache) if name.startswith("nar/")}


def nar_of(*samples: Sample) -> set[str]:
    return {f"nar/{sample.nar_name}" for sample in samples}


def test_a_path_goes_at_once_and_its_nar_later(server: OfflineServer, capsys: Capture) -> None:
    lines = server.said(capsys, "delete", PROGRAM.path.full("/nix/store"), "--verbose").splitlines()
    size = f"{len(PROGRAM.file)} bytes"
    assert lines == [
        f"main: {PROGRAM.path.base_name}, {size}: deleted",
        f"paths: 1 have gone; their NARs, {size}, stay for 10 d",
        "NARs: 0 have been deleted, which gives 0 bytes back",
    ]
    assert server.names() == {"library-1.0", "tool-1.0", "twin-2.0"}
    assert not {f"{PROGRAM.path.hash_part}.narinfo", f"{PROGRAM.path.hash_part}.ls"} & server.objects()
    assert nars(server) == nar_of(*ALL)
    server.pass_time(11 * DAY)
    server.said(capsys, "gc")
    assert nars(server) == nar_of(LIBRARY, TOOL)


def test_what_others_need_goes_only_with_them(server: OfflineServer, capsys: Capture) -> None:
    assert server.command("delete", LIBRARY.path.base_name) == 1
    assert "needed by tool-1.0 (2 paths in all): --with-referrers deletes these as well" in capsys.readouterr().err
    assert len(server.names()) == 4
    told = server.told(capsys, "delete", LIBRARY.path.base_name, "--with-referrers", "--reason", "not  free")
    reasons = [(event["path"].partition("-")[2], event["reason"]) for event in told[:-1]]
    assert reasons == [
        ("program-2.0", "deleted with what it needs: not free"),
        ("tool-1.0", "deleted with what it needs: not free"),
        ("library-1.0", "deleted: not free"),
    ]
    assert (told[-1]["paths"], told[-1]["kept"]) == (3, 0)
    # the twin has the NAR of the tool
    assert told[-1]["path_bytes"] == len(LIBRARY.file) + len(PROGRAM.file)
    assert server.names() == {"twin-2.0"}
    said = server.said(capsys, "why", TOOL.path.base_name, status=1)
    assert "with cachesrv delete: deleted with what it needs: not free" in said


def test_all_that_is_needed_together_goes_together(server: OfflineServer, capsys: Capture) -> None:
    server.said(capsys, "delete", *(sample.path.base_name for sample in (LIBRARY, PROGRAM, TOOL)))
    assert server.names() == {"twin-2.0"}


def test_patterns(server: OfflineServer, capsys: Capture) -> None:
    *told, _ = server.told(capsys, "delete", "*-2.?", "--dry-run")
    assert {event["path"] for event in told} == {PROGRAM.path.base_name, TWIN.path.base_name}
    *told, _ = server.told(capsys, "delete", f"{TWIN.path.hash_part[:8]}*", "p*", "--dry-run")
    assert {event["path"] for event in told} == {PROGRAM.path.base_name, TWIN.path.base_name}
    assert server.command("delete", "twin*", "none*") == 1
    assert "no path in the cache main matches none*" in capsys.readouterr().err
    assert len(server.names()) == 4
    server.said(capsys, "delete", "t[wx]in*")
    assert server.names() == {"library-1.0", "tool-1.0", "program-2.0"}


def test_a_rehearsal_changes_nothing(server: OfflineServer, capsys: Capture) -> None:
    before = server.objects()
    lines = server.said(capsys, "delete", LIBRARY.path.base_name, "--with-referrers", "--dry-run", "--now").splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("paths: 3 would go; their NARs, ")
    assert lines[-1].endswith(", go at once")
    assert server.objects() == before
    assert len(server.names()) == 4


def test_at_once_even_if_a_push_relies_on_it(server: OfflineServer, capsys: Capture) -> None:
    """What should never have been pushed is gone, with its bytes; but for the NAR of another path."""
    lease = 2**40

    async def rely(services: object) -> None:
        catalog = services.catalog  # type: ignore[attr-defined]  # they are Services
        await catalog.lease("main", [sample.path.hash_part for sample in ALL], lease)
        await catalog.lease_nars("main", [sample.nar_hash.nix32 for sample in ALL], lease)

    server.use(rely)
    told = server.told(capsys, "delete", PROGRAM.path.base_name, TOOL.path.base_name, "--now")
    assert [event.get("key") for event in told if event["event"] == "nar"] == [f"main/nar/{PROGRAM.nar_name}"]
    assert (told[-1]["nars"], told[-1]["nar_bytes"]) == (1, len(PROGRAM.file))
    assert nars(server) == nar_of(LIBRARY, TWIN)
    server.push(*ALL)
    assert len(server.names()) == 4


def test_what_is_pinned_stays(server: OfflineServer, capsys: Capture) -> None:
    server.said(capsys, "pin", "add", "release", PROGRAM.path.base_name)
    server.said(capsys, "pin", "add", "old", TOOL.path.base_name, "--expires", "1d")
    server.pass_time(2 * DAY)
    for arguments in (["--all"], [LIBRARY.path.base_name, "--with-referrers"]):
        assert server.command("delete", *arguments) == 1
        assert "these paths are pinned as release: `cachesrv pin remove`" in capsys.readouterr().err
    assert len(server.names()) == 4
    server.said(capsys, "pin", "remove", "release")
    server.said(capsys, "delete", "--all")
    assert server.names() == set()


def test_all_of_a_cache_but_not_of_others(server: OfflineServer, capsys: Capture) -> None:
    for cache in ("team", "shared"):
        server.push(LIBRARY, TWIN, cache=cache)
    server.said(capsys, "delete", "--all", "--now", "--cache", "team")
    assert server.names("team") == set()
    assert server.names("shared") == {"library-1.0", "twin-2.0"}
    assert nars(server, "team") == nar_of(LIBRARY, TWIN)
    assert f"{TWIN.path.hash_part}.narinfo" in server.objects("team")
    server.said(capsys, "delete", "--all", "--now", "--cache", "shared")
    assert server.objects("team") == {"nix-cache-info"}
    assert len(server.names()) == 4


def test_what_is_not_there(server: OfflineServer, capsys: Capture) -> None:
    assert server.command("delete", TWIN.path.base_name, f"{'0' * 32}-none") == 1
    assert f"{'0' * 32} is not in the cache main" in capsys.readouterr().err
    assert len(server.names()) == 4


@pytest.mark.parametrize("arguments", [[], ["--all", "x"]])
def test_either_paths_or_all(server: OfflineServer, capsys: Capture, arguments: list[str]) -> None:
    assert server.command("delete", *arguments) == 2
    assert "name paths, or say --all" in capsys.readouterr().err


def test_a_bucket_that_others_write_to(server: OfflineServer, capsys: Capture) -> None:
    server.configure("[[cache]]\nname = 'main'\nauthority = 'bucket'\n")
    assert server.command("delete", "--all") == 1
    assert "others write to the bucket of main" in capsys.readouterr().err
    server.configure("[[cache]]\nname = 'main'\n[[cache]]\nname = 'theirs'\nprefix = 'main'\nauthority = 'bucket'\n")
    assert server.command("delete", "--all", "--yes", "--cache", "main") == 1
    assert "others write to the bucket of main" in capsys.readouterr().err


def test_a_catalog_that_does_not_know_what_there_is(server: OfflineServer, capsys: Capture) -> None:
    server.use(lambda services: services.catalog.note("complete main", "no"))
    assert server.command("delete", TWIN.path.base_name) == 1
    assert "run `cachesrv reindex` first" in capsys.readouterr().err


def test_one_at_a_time(server: OfflineServer, capsys: Capture) -> None:
    async def busy() -> int:
        catalog = await wiring.open_catalog(server.config)
        try:
            async with maintenance(catalog):
                return await asyncio.to_thread(server.command, "delete", "--all")
        finally:
            await catalog.close()

    assert asyncio.run(busy()) == 1
    assert "is at it" in capsys.readouterr().err
    assert len(server.names()) == 4


def test_what_was_published_since_is_not_taken_for_what_was_chosen(server: OfflineServer) -> None:
    """The database gives the number of the latest path again when that has gone: meanwhile somebody waits, for the lock
    or for an answer.
    """
    newer = Sample("newer-1.0", b"newer")

    def choose(*samples: Sample) -> Chosen:
        wish = Wish([sample.path.hash_part for sample in samples])
        return server.use(lambda services: wiring.build_delete(server.config, services, "main").choose(wish))

    def carry_out(chosen: Chosen) -> Report:
        async def carry_out(services: Services) -> Report:
            async with maintenance(services.catalog) as holder:
                deletion = wiring.build_delete(server.config, services, "main")
                return await deletion.run(chosen, holder, Silent(), by="ann")

        return server.use(carry_out)

    def number(sample: Sample) -> list[int]:
        numbers = server.use(lambda services: services.catalog.numbers("main", [sample.path.hash_part]))
        return [*numbers.values()]

    chosen, before = choose(TWIN, PROGRAM), number(TWIN)
    assert carry_out(choose(TWIN)).paths == 1
    server.push(newer)
    assert number(newer) == before
    report = carry_out(chosen)
    assert server.names() == {"library-1.0", "tool-1.0", "newer-1.0"}
    assert (report.paths, report.kept) == (1, 1)


def test_who_cannot_be_asked_has_to_say_yes(
    server: OfflineServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delete, "_MANY", 3)
    assert server.command("delete", "--all") == 2
    assert "Delete 4 paths from main? Nobody can be asked here: say --yes" in capsys.readouterr().err
    assert len(server.names()) == 4
    server.said(capsys, "delete", "--all", "--dry-run")
    server.said(capsys, "delete", "--all", "--yes")
    assert server.names() == set()


@pytest.mark.parametrize(("answer", "status", "left"), [("n", 130, 4), ("y", 0, 0)])
def test_on_a_terminal_it_asks(server: OfflineServer, answer: str, status: int, left: int) -> None:
    asked, terminal = pty.openpty()
    command = ["delete", "--all", "--data-dir", str(server.data.root), "--config", str(server.config_file)]
    code = f"import sys; from cachesrv.cli import delete, main; delete._MANY = 3; main({command!r})"
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=os.environ
    )
    try:
        os.write(asked, f"{answer}\n".encode())
        assert running.wait(60) == status
    finally:
        running.kill()
        running.communicate()
        said = os.read(asked, 4096).decode()
        os.close(terminal)
        os.close(asked)
    assert "Delete 4 paths from main? [y/N]:" in said
    assert len(server.names()) == left


def test_help_has_an_example(capsys: Capture) -> None:
    assert run(["delete", "--help"]) == 0
    assert "  cachesrv delete ./result --dry-run" in capsys.readouterr().out
