"""`cachesrv verify` beside a running server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.system.nix import CHAIN
from tests.system.push import push
from tests.system.server import CACHESRV

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.nix import Nix
    from tests.system.server import Server


def verify(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CACHESRV, "verify", "--data-dir", str(server.data_dir), *arguments],
        check=False,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def report(server: Server, *arguments: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit status, summary and flaws."""
    done = verify(server, "--json", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    *flaws, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert summary["event"] == "summary"
    assert all(flaw.pop("event") == "flaw" and flaw["advice"] for flaw in flaws)
    return done.returncode, summary, flaws


def make_old(*files: Path) -> None:
    """What is young may be on its way."""
    long_ago = time.time() - 200_000
    for file in files:
        os.utime(file, (long_ago, long_ago))


def nar_of(server: Server, path: str) -> Path:
    narinfo = server.objects / f"{hash_part(path)}.narinfo"
    (url,) = [line[5:] for line in narinfo.read_text().splitlines() if line.startswith("URL: ")]
    return server.objects / url


def hash_part(path: str) -> str:
    return path.rpartition("/")[2][:32]


def test_what_is_wrong_is_found_beside_a_running_server(builder: Nix, cache: Server) -> None:
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    push(builder, cache, program)
    status, summary, flaws = report(cache, "--contents", "--jobs", "2")
    assert (status, flaws, summary["paths"], summary["nars"], summary["flaws"]) == (0, [], 3, 3, {})
    damaged = bytearray(nar_of(cache, tool).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    nar_of(cache, tool).write_bytes(damaged)
    os.truncate(nar_of(cache, program), 10)
    nar_of(cache, library).unlink()
    orphan, leftover = cache.objects / "nar" / "orphan.nar", cache.objects / "nar" / ".incoming-0123"
    for file in (orphan, leftover):
        file.write_bytes(b"whatever")
        make_old(file)
    status, summary, flaws = report(cache, "--contents", "main")
    assert status == 3
    assert {(flaw["kind"], flaw["path"][33:] or flaw["object"]) for flaw in flaws} == {
        ("damaged-nar", "tool"),
        ("wrong-size", "program"),
        ("missing-nar", "library"),
        ("orphan-nar", "main/nar/orphan.nar"),
        ("stale-temporary-file", "main/nar/.incoming-0123"),
    }
    assert sum(summary["flaws"].values()) == 5
    done = verify(cache)
    assert done.returncode == 3
    url = nar_of(cache, program).relative_to(cache.objects)
    assert f"main: {hash_part(program)}-program: its NAR {url} has 10 bytes, its narinfo says " in done.stdout
    assert "3 paths looked at, 4 flaws\n" in done.stdout
    assert "  1 wrong-size: `cachesrv verify --repair`" in done.stdout
    assert "main: published paths, 3\n" in done.stderr


def test_a_catalog_that_is_gone_is_found_out(builder: Nix, cache: Server) -> None:
    (program,) = builder.build(CHAIN, "program")
    push(builder, cache, program)
    cache.stop()
    for file in cache.data_dir.glob("catalog.sqlite*"):
        file.unlink()
    make_old(*cache.objects.glob("*.narinfo"))
    status, summary, _ = report(cache)
    assert (status, summary["flaws"]) == (3, {"unpublished-path": 3, "dangling-index-entry": 3})
    shutil.rmtree(cache.data_dir / "index")
    assert report(cache)[1]["flaws"] == {"unpublished-path": 3}


def test_wrong_usage(cache: Server) -> None:
    for arguments, said in ((["nosuch"], "no cache is called nosuch; there are main"), (["--rate", "x"], "50 MiB")):
        done = verify(cache, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    elsewhere = [*CACHESRV, "verify", "--data-dir", str(cache.folder / "nothing")]
    done = subprocess.run(elsewhere, check=False, env=cache.environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "no server has been started" in done.stderr) == (2, True)
