"""Garbage collection and deletion beside a running server, with real clients; time passes in the catalog."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.offline import DAY, pass_time
from tests.system.conftest import both_storages, both_ways_and_storages
from tests.system.nix import CHAIN
from tests.system.push import push
from tests.system.server import CACHESRV, until

if TYPE_CHECKING:
    from tests.system.conftest import StartServer
    from tests.system.nix import Nix
    from tests.system.push import Fill
    from tests.system.server import Server

_CONFIG = """
[collect]
nar_grace = "10 d"
[[cache]]
name = "main"
root = true
retention_age = "90 d"
[[cache]]
name = "twin"
prefix = "main"
"""


@pytest.fixture
def cache(builder: Nix, make_server: StartServer) -> Server:
    """A server that keeps paths for 90 days."""
    environment = {"CACHESRV_SERVER__STORE_DIR": builder.store_dir, "CACHESRV_SERVER__WORKERS": "2"}
    server = make_server(environment=environment, config=_CONFIG).start()
    builder.log_in(server.token)
    return server


def maintain(server: Server, *arguments: str, status: int = 0, errors: bool = False) -> str:
    """Run a command beside the server; what it prints, or says of its `errors`."""
    done = subprocess.run(
        [*CACHESRV, *arguments, "--data-dir", str(server.data_dir), "--config", str(server.config_file)],
        check=False,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stderr if errors else done.stdout


def told(server: Server, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in maintain(server, *arguments, "--json").splitlines()]


def status(server: Server, path: str) -> int:
    """Of the narinfo."""
    return server.client().get(f"/main/{Path(path).name[:32]}.narinfo").status


def nars_there(server: Server, *urls: str) -> list[bool]:
    """Which of these NARs clients get, or are sent to."""
    statuses = [server.client().get(f"/main/{url}").status for url in urls]
    assert set(statuses) <= {200, 307, 404}
    return [status != 404 for status in statuses]


def nar_url(server: Server, path: str) -> str:
    return next(
        line.removeprefix("URL: ")
        for line in server.client().get(f"/main/{Path(path).name[:32]}.narinfo").text.splitlines()
        if line.startswith("URL: ")
    )


def age(server: Server, seconds: int) -> None:
    pass_time(server.data_dir / "catalog.sqlite", seconds)


@both_ways_and_storages
def test_what_nobody_needs_goes_and_closures_stay_whole(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    fill(builder, cache, program)
    maintain(cache, "pin", "add", "release", tool, "--keep", "5")
    url = nar_url(cache, program)
    age(cache, 91 * DAY)

    path, summary = told(cache, "gc", "--dry-run")
    size = len(cache.stored.read(url))
    assert (path["path"], path["size"]) == (Path(program).name, size)
    assert "not used for more than retention_age = 90 d, last used 20" in path["reason"]
    assert (summary["paths"], summary["path_bytes"], summary["nars"]) == (1, size, 0)
    assert status(cache, program) == 200

    assert "kept by the pin release: tool -> library" in maintain(cache, "why", library)
    assert "nothing keeps it" in maintain(cache, "why", program)
    maintain(cache, "gc")
    assert "was removed 20" in maintain(cache, "why", program, status=1)
    for _ in range(4):  # whichever worker is asked
        assert [status(cache, each) for each in (program, tool, library)] == [404, 200, 200]
    # who has seen the narinfo before can still have the NAR
    assert nars_there(cache, url) == [True]
    client.run("nix", "store", "verify", "-r", "--store", cache.main, "--sigs-needed", "1", tool)
    client.run("nix", "copy", "--from", cache.main, tool)
    assert client.hashes(tool) == builder.hashes(tool)
    cache.stop()
    objects = f"file://{cache.stored.copy()}"
    client.run("nix", "store", "verify", "-r", "--store", objects, "--sigs-needed", "1", tool)
    assert client.attempt("nix", "path-info", "--store", objects, program).returncode != 0
    cache.start()

    age(cache, 11 * DAY)
    (nar, summary) = told(cache, "gc")
    assert (nar["key"], summary["nar_bytes"]) == (f"main/{url}", size)
    assert url not in cache.stored.names()
    assert nars_there(cache, url) == [False]
    assert status(cache, tool) == 200
    # it can come back, once its pusher does not remember that it is there
    builder.forget()
    fill(builder, cache, program)
    client.forget()
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


def test_what_clients_ask_for_stays(builder: Nix, cache: Server, client: Nix) -> None:
    """By its narinfo, or by its NAR alone: that is what clients do who remember the narinfo."""
    paths = [builder.add(f"path-{number}", f"content {number}") for number in range(4)]
    push(builder, cache, *paths)
    url = nar_url(cache, paths[1])
    cache.stop()  # then the use that this was is noted, which a running server does in a minute
    cache.start()
    age(cache, 91 * DAY)
    client.run("nix", "path-info", "--store", cache.main, paths[0])
    assert nars_there(cache, url) == [True]
    client.run("nix", "copy", "--from", cache.main, paths[2])
    cache.stop()
    cache.start()
    assert [event["path"] for event in told(cache, "gc")[:-1]] == [Path(paths[3]).name]
    assert [status(cache, path) for path in paths] == [200, 200, 200, 404]


def test_a_push_can_rely_on_what_it_was_told(builder: Nix, cache: Server) -> None:
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    push(builder, cache, tool)
    age(cache, 91 * DAY)
    wanted = [[Path(path).name, info["narHash"], info["narSize"]] for path, info in builder.infos(tool).items()]
    asked = json.dumps({"paths": wanted}).encode()
    assert cache.pusher.ask("POST", "/api/v1/caches/main/missing", asked).status == 200
    assert told(cache, "gc")[-1]["paths"] == 0
    push(builder, cache, program)
    assert [status(cache, path) for path in (program, tool, library)] == [200, 200, 200]


def test_what_went_can_come_back_without_being_sent(builder: Nix, cache: Server, client: Nix) -> None:
    """As long as its NAR is kept for others."""
    (program,) = builder.build(CHAIN, "program")
    push(builder, cache, program)
    age(cache, 91 * DAY)
    assert told(cache, "gc")[-1]["paths"] == 3
    again = push(builder, cache, program)
    assert (again["uploaded"], again["sent_bytes"]) == (3, 0)
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


@both_storages
def test_what_is_deleted_is_gone_at_once(builder: Nix, cache: Server, client: Nix) -> None:
    """From all that a client can ask, and with its bytes if that is wanted; and can come back."""
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    push(builder, cache, program)
    urls = {path: nar_url(cache, path) for path in (program, tool, library)}
    assert "needed by program, tool" in maintain(cache, "delete", library, status=1, errors=True)
    *events, summary = told(cache, "delete", tool, "--with-referrers", "--now", "--reason", "a secret in it")
    assert [event["path"] for event in events if event["event"] == "path"] == [Path(program).name, Path(tool).name]
    assert (summary["paths"], summary["nars"], summary["kept"]) == (2, 2, 0)
    for _ in range(4):  # whichever worker is asked
        assert [status(cache, path) for path in urls] == [404, 404, 200]
    until(lambda: nars_there(cache, *urls.values()) == [False, False, True], "the NARs are still there")
    assert cache.stored.names("nar/") == {urls[library]}
    assert "with cachesrv delete: deleted: a secret in it" in maintain(cache, "why", tool, status=1)
    assert client.attempt("nix", "copy", "--from", cache.main, program).returncode != 0
    push(builder, cache, program)
    client.forget()
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


@both_storages
def test_equal_nars_are_stored_once_and_stay_for_the_last_path(builder: Nix, cache: Server, client: Nix) -> None:
    """Under two names in one cache, and in another one that has the same objects."""
    first, second = builder.add("first", "the same"), builder.add("second", "the same")
    builder.run("nix", "copy", "--to", cache.main, first)
    push(builder, cache, second)
    builder.run("nix", "copy", "--to", f"{cache.url}/twin", first)
    urls = {nar_url(cache, path) for path in (first, second)}
    assert len(urls) == 1
    assert cache.stored.names("nar/") == urls
    maintain(cache, "delete", first, "--now")
    age(cache, 91 * DAY)
    assert told(cache, "gc")[-1]["paths"] == 1
    age(cache, 11 * DAY)
    assert told(cache, "gc")[-1]["nars"] == 0
    assert [status(cache, path) for path in (first, second)] == [404, 404]
    client.run("nix", "copy", "--from", f"{cache.url}/twin", first)
    maintain(cache, "delete", "--all", "--cache", "twin")
    age(cache, 11 * DAY)
    assert told(cache, "gc")[-1]["nars"] == 1
    assert cache.stored.names() == {"nix-cache-info"}
