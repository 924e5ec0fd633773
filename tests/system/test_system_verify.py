"""`cachesrv verify` beside a running server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.nix.hashes import Hash
from tests.system.nix import CHAIN, CONTENT_ADDRESSED
from tests.system.push import push
from tests.system.server import CACHESRV, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.conftest import MakeNix, StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server


def run(server: Server, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CACHESRV, command, "--data-dir", str(server.data_dir), *arguments],
        check=False,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def verify(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(server, "verify", *arguments)


def repair(server: Server, *arguments: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit status, summary, and all that was told before."""
    done = verify(server, "--repair", "--json", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    *events, summary = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, summary, events


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
    assert "paths looked at: 3; flaws: 4\n" in done.stdout
    assert "  1 wrong-size: `cachesrv verify --repair`" in done.stdout
    assert "main: published paths, 3\n" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_was_interrupted_goes_on(builder: Nix, cache: Server, how: signal.Signals) -> None:
    push(builder, cache, *(builder.add(f"large-{number}", os.urandom(2_000_000)) for number in range(3)))
    command = cache.command("verify", "--contents", "--rate", "1 MiB")
    with subprocess.Popen(command, env=cache.environment, stderr=subprocess.PIPE, text=True) as process:
        journal = cache.data_dir / "verification"
        until(lambda: journal.exists() and b"position" in journal.read_bytes(), "it does not begin")
        time.sleep(0.2)  # into a NAR, wherever that is
        process.send_signal(how)
        assert process.stderr
        said = process.stderr.read()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert said.split("\n\n") == ["main: published paths, 3", "cachesrv: interrupted\n"]
    done = verify(cache, "--contents")
    assert done.returncode == 0
    assert done.stderr.startswith("going on with what was begun 2")
    assert "paths looked at: 3, NARs read: 3 " in done.stdout


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_cannot_be_mended_goes_and_clients_get_the_rest(builder: Nix, cache: Server, client: Nix) -> None:
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    push(builder, cache, program)
    damage(nar_of(cache, tool))
    status, summary, events = repair(cache, "--contents")
    assert (status, summary["removed"], summary["left"]) == (3, 2, 0)
    removed = {event["path"][33:]: event["get_back"] for event in events if event.get("result") == "removed"}
    assert removed.keys() == {"tool", "program"}
    assert removed["tool"].startswith(f"cachesrv push {tool}; it was built by ")
    assert report(cache, "--contents")[0] == 0
    assert [cache.client().get(f"/main/{hash_part(path)}.narinfo").status for path in (program, tool, library)] == [
        404,
        404,
        200,
    ]
    client.run("nix", "copy", "--from", cache.main, library)
    done = run(cache, "why", tool)
    assert "is damaged: " in done.stdout or "has the hash sha256:" in done.stdout
    assert "cachesrv verify --repair" in done.stdout
    push(builder, cache, program)
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


def test_other_copies_mend_what_is_broken(builder: Nix, cache: Server, client: Nix) -> None:
    """From the store of this machine, and from any other cache; the server goes on."""
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    push(builder, cache, program)
    folder = builder.folder / "plain"
    builder.run("nix", "copy", "--to", f"file://{folder}?compression=xz", program)
    damage(nar_of(cache, tool))
    nar_of(cache, library).unlink()
    (cache.objects / f"{hash_part(program)}.narinfo").write_text("garbage")
    status, summary, events = repair(cache, "--contents", "--from", str(folder))
    assert (status, summary["mended"]) == (0, 3)
    whats = {event["path"][33:]: event["what"] for event in events if event["event"] == "repair"}
    assert whats["tool"] == whats["library"] == f"its NAR was taken from {folder}"
    assert report(cache, "--contents")[0] == 0
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)
    damage(nar_of(cache, program))
    local = {name: builder.environment[name] for name in ("NIX_STORE_DIR", "NIX_STATE_DIR", "NIX_CONF_DIR")}
    cache.environment |= local
    status, summary, events = repair(cache, "--contents")
    assert (status, summary["mended"]) == (0, 1)
    assert events[-1]["what"] == "its NAR was taken from the local Nix store"
    assert report(cache, "--contents")[0] == 0


def test_realisations_are_looked_at_and_come_back(builder: Nix, cache: Server, client: Nix) -> None:
    (program,) = builder.build(CONTENT_ADDRESSED, "program")
    push(builder, cache, program)
    assert report(cache)[0] == 0
    broken, swapped, *_ = sorted((cache.objects / "realisations").iterdir())
    swapped.write_bytes(broken.read_bytes())
    broken.write_text("garbage")
    status, summary, _ = report(cache)
    assert (status, summary["flaws"]) == (3, {"bad-realisation": 2})
    status, summary, events = repair(cache)
    assert (status, summary["removed"], summary["left"]) == (3, 2, 0)
    assert all("push it again; what lay there is in " in event["get_back"] for event in events if "get_back" in event)
    assert report(cache)[0] == 0
    push(builder, cache, program)
    assert client.build(CONTENT_ADDRESSED, "program") == [program]
    assert report(cache)[0] == 0


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
    # what a path refers to is published with it, and need not be mended then
    status, summary, _ = repair(cache)
    assert (status, summary["removed"], summary["left"], summary["mended"] in (1, 2, 3)) == (0, 0, 0, True)
    status, summary, _ = report(cache, "--contents")
    assert (status, summary["paths"], summary["nars"]) == (0, 3, 3)


def test_wrong_usage(cache: Server) -> None:
    for arguments, said in (
        (["nosuch"], "no cache is called nosuch; there are main"),
        (["--rate", "x"], "50 MiB"),
        (["--repair", "--from", "nowhere"], "nowhere is not a folder that is a binary cache"),
    ):
        done = verify(cache, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    elsewhere = [*CACHESRV, "verify", "--data-dir", str(cache.folder / "nothing")]
    done = subprocess.run(elsewhere, check=False, env=cache.environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "no server has been started" in done.stderr) == (2, True)


def test_the_server_looks_by_itself_when_it_is_asked_to(make_server: StartServer, builder: Nix) -> None:
    environment = {"CACHESRV_SERVER__STORE_DIR": builder.store_dir, "CACHESRV_VERIFY__INTERVAL": "1"}
    server = make_server(environment=environment | {"CACHESRV_SERVER__WORKERS": "2"}).start()
    builder.log_in(server.token)
    (library,) = builder.build(CHAIN, "library")
    push(builder, server, library)
    until(lambda: gauge(server, "verified_at_seconds") > 0, "it does not look")
    assert gauge(server, "flaws") == 0
    damage(nar_of(server, library))
    until(lambda: gauge(server, "flaws") == 1, "it does not see the damage")
    until(lambda: gauge(server, "verifications_total") >= 2, "it does not count")
    until(lambda: "the verification found flaws" in server.log, "it does not tell")
    assert f"{hash_part(library)}-library" in server.log
    assert server.client().get(f"/main/{hash_part(library)}.narinfo").status == 200


def gauge(server: Server, name: str) -> float:
    metrics = server.client().get("/metrics").text
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"cachesrv_{name} ")]
    return float(line.rpartition(" ")[2])


UNSTEADY = """
    derivation {
      name = "unsteady";
      system = builtins.currentSystem;
      builder = "/bin/sh";
      args = [ "-c" "PATH=/usr/bin:/bin; mkdir $out; echo $$ > $out/pid; echo steady > $out/steady; touch $out/empty" ];
    }
"""


def test_what_was_built_otherwise_is_remembered_and_shown(make_nix: MakeNix, make_server: StartServer) -> None:
    """By both ways to push."""
    first = make_nix(builds=True)
    server = make_server(environment={"CACHESRV_SERVER__STORE_DIR": first.store_dir}).start()
    first.log_in(server.token)
    (path,) = first.build(UNSTEADY)
    push(first, server, path)
    local = {name: first.environment[name] for name in ("NIX_STORE_DIR", "NIX_STATE_DIR", "NIX_CONF_DIR")}
    server.environment |= local
    done = run(server, "verify", "--determinism", path)
    assert (done.returncode, done.stdout.splitlines()[0].partition(": ")[2][:8]) == (0, "the same")
    published = next(iter(first.hashes(path).values()))
    first.run("nix-store", "--delete", path)
    assert first.build(UNSTEADY) == [path]
    again = next(iter(first.hashes(path).values()))
    assert again != published
    refused = first.attempt(*CACHESRV, "push", "--to", server.main, "--token-file", str(server.token_file), path)
    assert refused.returncode == 3, refused.stderr
    url = f"/main/{hash_part(path)}.narinfo"
    text = server.client().get(url).text
    other = "\n".join(f"NarHash: sha256:{'1' * 52}" if "NarHash" in line else line for line in text.split("\n"))
    assert server.pusher.put(url, other.encode()).status == 409
    done = run(server, "verify", "--determinism", path)
    assert done.returncode == 3
    first_line, difference, *remembered, last = done.stdout.splitlines()
    assert first_line.startswith(f"{path}: here sha256:")
    assert difference.startswith("  pid: here ")
    assert all(", published by push-token" in line for line in remembered)
    assert {line.partition("push-token pushed it with ")[2].partition(",")[0] for line in remembered} == {
        Hash.parse(again).nix32,
        f"sha256:{'1' * 52}",
    }
    assert last == "paths compared: 1; the same: 0, different: 1, not to be compared: 0"
    done = run(server, "verify", "--determinism", "--json", "--from", str(server.objects), path)
    compared, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["name"] for one in compared["differences"]] == ["pid"]
    assert compared["differences"][0]["here"]["type"] == "regular"
    assert (summary["different"], summary["same"]) == (1, 0)
    done = run(server, "verify", "--determinism", f"{first.store_dir}/{'0' * 32}-nothing")
    assert done.returncode == 3
    assert "is not valid in the local Nix store" in done.stdout
