"""What a configuration that is read again says of caches holds at once, as after a start with it."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample
from tests.system.server import until

if TYPE_CHECKING:
    from tests.system.client import Client
    from tests.system.conftest import StartServer
    from tests.system.server import Server

SAMPLE = Sample("sample", b"content" * 1000, compression="zstd")
MAIN = '[[cache]]\nname = "main"\nroot = true\n'


@pytest.fixture
def upstream(make_server: StartServer) -> Server:
    """Has the sample."""
    server = make_server().start()
    assert server.pusher.put(SAMPLE.nar_url, SAMPLE.file).status == 204
    assert server.pusher.put(SAMPLE.narinfo_url, SAMPLE.narinfo()).status == 204
    return server


def reload(server: Server, config: str) -> None:
    told = server.log.count("configuration reloaded")
    server.config_file.write_text(config)
    server.signal(signal.SIGHUP)
    until(lambda: server.log.count("configuration reloaded") > told, "nothing is read again")


def fetched(client: Client, cache: str) -> bytes:
    """The NAR of the sample, as a client comes to it."""
    found = client.get(SAMPLE.narinfo_url.replace("main", cache, 1))
    assert found.status == 200
    url = re.search(r"^URL: (.*)$", found.text, re.MULTILINE)
    assert url
    answer = client.get(f"/{cache}/{url[1]}")
    assert answer.status == 200
    return answer.body


def test_a_cache_comes_to_pull_through(make_server: StartServer, upstream: Server) -> None:
    declared = f'[[upstream]]\nname = "up"\nurl = "{upstream.main}"\npublic_keys = ["{upstream.public_key}"]\n'
    relying = 'references = "upstream"\nupstreams = ["up"]\n'
    server = make_server(config=MAIN).start()
    reload(server, MAIN + relying + declared)
    assert server.client().get(Sample("absent").narinfo_url).status == 404
    reload(server, MAIN + relying + "pull_through = true\n" + declared)
    assert fetched(server.client(), "main") == SAMPLE.file
    added = f'[[cache]]\nname = "added"\n{relying}pull_through = true\n'
    reload(server, MAIN + added + declared)
    assert fetched(server.client(), "added") == SAMPLE.file
    # and comes to do so no more: what it has, it keeps; what it has only spoken of is gone when it is asked for
    other = Sample("other")
    assert upstream.pusher.put(other.nar_url, other.file).status == 204
    assert upstream.pusher.put(other.narinfo_url, other.narinfo()).status == 204
    narinfo = other.narinfo_url.replace("main", "added", 1)
    spoken_of = server.client().get(narinfo)
    assert spoken_of.status == 200
    reload(server, MAIN + added.replace("true", "false") + declared)
    assert fetched(server.client(), "added") == SAMPLE.file
    url = re.search(r"^URL: (.*)$", spoken_of.text, re.MULTILINE)
    assert url
    assert server.client().get(f"/added/{url[1]}").status == 404
    assert server.client().get(narinfo).status == 404


def test_an_upstream_that_cannot_be_asked_changes_nothing(make_server: StartServer) -> None:
    server = make_server(config=MAIN).start()
    wrong = '[[upstream]]\nname = "up"\nurl = "https://cache.test"\npublic_keys = ["up-1:AAAA"]\n'
    server.config_file.write_text(f"{MAIN}priority = 20\n{wrong}")
    server.signal(signal.SIGHUP)
    until(lambda: "the configuration stays as it was" in server.log, "the mistake is not told")
    assert b"Priority: 40\n" in server.client().get("/main/nix-cache-info").body


def test_of_a_cache_that_is_added_it_is_known_at_once_what_is_not_there(make_server: StartServer) -> None:
    server = make_server(config=MAIN).start()
    note = "select value from notes where name = 'complete added'"
    reload(server, f'{MAIN}[[cache]]\nname = "added"\n')
    until(lambda: server.query(note) == [("0",)], "storage is asked for whatever is not there")
    # What lies there already has to be taken in.
    (server.data_dir / "objects" / "filled").mkdir()
    (server.data_dir / "objects" / "filled" / f"{SAMPLE.path.hash_part}.narinfo").write_bytes(SAMPLE.narinfo())
    reload(server, f'{MAIN}[[cache]]\nname = "filled"\n')
    until(lambda: "the catalog is incomplete" in server.log, "it is not told that a reindex is needed")


def test_a_cache_that_becomes_private_is_so_on_every_connection(make_server: StartServer) -> None:
    server = make_server(config=f"[server]\nworkers = 2\n{MAIN}").start()
    assert server.pusher.put(SAMPLE.nar_url, SAMPLE.file).status == 204
    assert server.pusher.put(SAMPLE.narinfo_url, SAMPLE.narinfo()).status == 204
    connections = [server.client().open() for _ in range(20)]

    def statuses(path: str) -> list[int]:
        answers = []
        for connection in connections:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            answers.append(response.status)
        return answers

    assert statuses(SAMPLE.narinfo_url) == statuses(SAMPLE.nar_url) == [200] * 20
    assert statuses("/main/nix-cache-info") == [200] * 20
    connections += [server.client().open() for _ in range(20)]
    assert statuses(SAMPLE.narinfo_url) == statuses(SAMPLE.nar_url) == [200] * 40
    told = server.log.count("configuration reloaded")
    server.config_file.write_text(f"[server]\nworkers = 2\n{MAIN}public = false\n")
    server.signal(signal.SIGHUP)
    until(lambda: server.log.count("configuration reloaded") == told + 2, "a worker reads nothing again")
    assert statuses(SAMPLE.narinfo_url) == statuses(SAMPLE.nar_url) == [401] * 40
    for connection in connections:
        connection.close()
