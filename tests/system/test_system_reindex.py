"""`cachesrv reindex` as a process: killed and begun again, beside a server, with new keys."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
from typing import TYPE_CHECKING, Any

from cachesrv.nix import narinfo
from cachesrv.nix.signing import PublicKey, SecretKey
from tests.samples import Sample, path_of
from tests.system.server import CACHESRV, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.system.conftest import MakeBucket, StartServer
    from tests.system.server import Server

MANY = 4500


def family(number: int) -> list[Sample]:
    """Paths with the same NAR, each of which refers to two before it."""

    def references(place: int) -> tuple[Any, ...]:
        return (path_of(f"p-{place - 1}"), path_of(f"p-{place // 2}")) if place > 1 else ()

    return [Sample(f"p-{place}", b"the same", references(place)) for place in range(number)]


def lay(server: Server, samples: Sequence[Sample]) -> None:
    """Put paths where the server keeps its objects, as another program would."""
    write(server.objects, samples)


def write(folder: Path, samples: Sequence[Sample]) -> None:
    (folder / "nar").mkdir(parents=True, exist_ok=True)
    for sample in samples:
        (folder / f"{sample.path.hash_part}.narinfo").write_bytes(sample.narinfo())
    for name, file in {sample.nar_name: sample.file for sample in samples}.items():
        (folder / "nar" / name).write_bytes(file)


def command(server: Server, *arguments: str) -> list[str]:
    config = ["--config", str(server.config_file)] if server.config_file.exists() else []
    return [*CACHESRV, "reindex", "--data-dir", str(server.data_dir), *config, *arguments]


def reindex(server: Server, *arguments: str) -> dict[str, Any]:
    """What it says in the end."""
    done = subprocess.run(
        command(server, "--json", *arguments), check=False, env=server.environment, capture_output=True, timeout=120
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert not done.stderr, done.stderr.decode()
    assert events[-1]["event"] == "summary"
    assert done.returncode == (3 if events[-1]["flaws"] else 0)
    flaws = [event for event in events if event["event"] == "flaw"]
    assert len(flaws) == events[-1]["flaws"]
    return {**events[-1], "found": flaws}


def kill_when(server: Server, condition: Callable[[], bool]) -> None:
    with (server.folder / "reindex.log").open("ab") as log:
        process = subprocess.Popen(command(server), env=server.environment, stdout=log, stderr=log)
    try:
        until(lambda: condition() or process.poll() is not None, "the reindex does not come so far")
        assert process.poll() is None, "the reindex ended too early: this shows nothing"
    finally:
        process.kill()
        process.wait()


def count(server: Server) -> int:
    try:
        return int(server.query("select count(*) from paths")[0][0])
    except sqlite3.OperationalError:
        return 0


def test_killed_at_several_points_it_goes_on_from_there(make_server: StartServer) -> None:
    server = make_server()
    lay(server, family(MANY))
    scratch = server.data_dir / "reindex" / "main" / "data.mdb"
    kill_when(server, lambda: scratch.exists() and scratch.stat().st_blocks > 1000)
    kill_when(server, lambda: count(server) > 0)
    assert 0 < count(server) < MANY
    # each path after what it refers to: nothing is wrong with what is served so far
    assert not server.query("select 1 from refs where not exists (select 1 from paths where paths.id = refs.name_id)")
    done = reindex(server)
    assert (done["paths"], done["known"], done["flaws"]) == (MANY, MANY, 0)
    assert not (server.data_dir / "reindex" / "main").exists()
    server.start()
    for sample in family(MANY)[:: MANY // 10]:
        assert server.client().get(sample.narinfo_url).body == sample.narinfo()


def test_a_lost_catalog_costs_no_answer(make_server: StartServer) -> None:
    """Before, during and after the reindex: what lies in storage is found, and can be relied upon."""
    server = make_server()
    there = family(MANY)
    lay(server, there)
    server.start()
    collected = subprocess.run(
        [*CACHESRV, "gc", "--data-dir", str(server.data_dir)],
        check=False,
        env=server.environment,
        capture_output=True,
        timeout=60,
    )
    assert b"run `cachesrv reindex` first" in collected.stderr
    pushed = [push(server, 0, there[7])]
    asked = iter(there)
    with subprocess.Popen(command(server), env=server.environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            pushed.append(push(server, len(pushed), next(asked)))
            for sample in [*pushed[-10:], *(next(asked) for _ in range(10))]:
                assert server.client().get(sample.narinfo_url).status == 200
            assert server.client().get(Sample("absent").narinfo_url).status == 404
    assert process.returncode == 0
    for sample in [*pushed, *there[:: MANY // 100]]:
        assert server.client().get(sample.narinfo_url).status == 200
    assert count(server) == MANY + len(pushed)
    assert reindex(server)["flaws"] == 0


def push(server: Server, number: int, needed: Sample) -> Sample:
    sample = Sample(f"new-{number}", b"new", (needed.path,))
    assert server.pusher.put(sample.nar_url, sample.file).status == 204
    assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204
    return sample


def test_two_at_once_are_kept_apart(make_server: StartServer) -> None:
    server = make_server()
    lay(server, family(MANY))
    with subprocess.Popen(command(server), env=server.environment, stdout=subprocess.DEVNULL) as first:
        until((server.data_dir / "reindex" / "main" / "data.mdb").exists, "the first does not begin")
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(
            command(server, "--wait", "0"), check=False, env=server.environment, capture_output=True, timeout=120
        )
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    assert second.returncode == 1
    assert b"is at it" in second.stderr
    assert count(server) == MANY


def test_a_change_of_keys(make_server: StartServer) -> None:
    """Narinfos get a signature by the new key, and keep that by the old one."""
    server = make_server().start()
    samples = [Sample("library", b"library"), Sample("tool", b"tool", (path_of("library"),))]
    for sample in samples:
        assert server.pusher.put(sample.nar_url, sample.file).status == 204
        assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204
    old = PublicKey.parse(server.public_key)
    server.stop()
    new = SecretKey.generate("main-2")
    for name in ("main.secret", "main.public"):
        (server.data_dir / "keys" / name).unlink()
    (server.data_dir / "keys" / "main.secret").write_text(f"{new.render()}\n")
    server.start()
    assert reindex(server, "--sign")["signed"] == 2
    for sample in samples:
        text = server.client().get(sample.narinfo_url).body
        info = narinfo.parse(text)
        assert new.sign(info.fingerprint) in info.signatures
        assert any(old.verify(info.fingerprint, signature) for signature in info.signatures)
        assert (server.objects / f"{sample.path.hash_part}.narinfo").read_bytes() == text
    assert reindex(server, "--sign")["signed"] == 0


def test_what_is_broken_is_named_with_what_to_do(make_server: StartServer) -> None:
    server = make_server()
    library, tool = Sample("library", b"library"), Sample("tool", b"tool", (path_of("library"),))
    lay(server, [library, tool])
    (server.objects / "nar" / library.nar_name).unlink()
    done = reindex(server)
    assert {(flaw["object"], flaw["kind"]) for flaw in done["found"]} == {
        (f"main/{library.path.hash_part}.narinfo", "missing-nar"),
        (f"main/{tool.path.hash_part}.narinfo", "missing-reference"),
    }
    assert all(flaw["advice"] and flaw["what"] for flaw in done["found"])
    assert (done["paths"], done["flaws"]) == (0, 2)


def test_a_bucket_that_others_have_filled(make_server: StartServer, make_bucket: MakeBucket, tmp_path: Path) -> None:
    """Taken as it lies there; signed by us as well, there and in the answers, when that is asked for."""
    server = make_server(stored=make_bucket("redirect"))
    there = family(100)
    write(tmp_path / "others", there)
    server.stored.fill(tmp_path / "others")
    done = reindex(server)
    assert (done["paths"], done["flaws"]) == (100, 0)
    server.start()
    assert server.client().get(there[0].narinfo_url).body == there[0].narinfo()
    assert reindex(server, "--sign")["signed"] == 100
    for sample in there[::20]:
        text = server.client().get(sample.narinfo_url).body
        assert b"\nSig: main-1:" in text
        assert server.stored.read(f"{sample.path.hash_part}.narinfo") == text


def test_a_cache_that_there_is_not(make_server: StartServer) -> None:
    server = make_server()
    done = subprocess.run(
        command(server, "--cache", "team"), check=False, env=server.environment, capture_output=True, timeout=60
    )
    assert done.returncode == 2
    assert b"no cache is called team; there are main" in done.stderr
    shutil.rmtree(server.data_dir)
