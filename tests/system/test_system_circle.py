"""Caches that pull through each other."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample, path_of
from tests.system.server import until

if TYPE_CHECKING:
    from tests.system.conftest import StartServer
    from tests.system.server import Server

_MAIN = '[[cache]]\nname = "main"\n'
SAMPLE, OTHER = Sample("sample", b"content"), Sample("other", b"other content")
MISSES = 8


def through(*servers: Server) -> str:
    """The configuration of one that pulls through these."""
    names = [f"u{number}" for number in range(len(servers))]
    declared = "".join(
        f'[[upstream]]\nname = "{name}"\nurl = "{server.main}"\npublic_keys = ["{server.public_key}"]\n'
        for name, server in zip(names, servers, strict=True)
    )
    return f"{_MAIN}pull_through = true\nupstreams = {names}\n{declared}"


@pytest.fixture
def servers(make_server: StartServer) -> list[Server]:
    """The first pulls through the second and the third, and the second through the first."""
    first, third = make_server(config=_MAIN).start(), make_server(config=_MAIN).start()
    second = make_server(config=through(first)).start()
    first.config_file.write_text(through(second, third))
    first.signal(signal.SIGHUP)
    until(lambda: "configuration reloaded" in first.log, "the configuration is not read again")
    return [first, second, third]


def publish(server: Server, sample: Sample) -> None:
    assert server.pusher.put(f"/main/nar/{sample.nar_name}", sample.file).status == 204
    assert server.pusher.put(f"/main/{sample.path.hash_part}.narinfo", sample.narinfo()).status == 204


def narinfo(sample: Sample) -> str:
    return f"/main/{sample.path.hash_part}.narinfo"


def url_of_nar(narinfo: str) -> str:
    return f"/main/{narinfo.partition('URL: ')[2].partition(chr(10))[0]}"


def test_who_asks_in_a_circle_is_answered(servers: list[Server]) -> None:
    first, second, third = servers
    missing = [f"/main/{path_of(f'missing-{number}').hash_part}.narinfo" for number in range(MISSES)]
    with ThreadPoolExecutor(2 * MISSES) as threads:
        asked = [threads.submit(server.client().get, path) for path in missing for server in (first, second)]
    assert {answer.result().status for answer in asked} == {404}
    # The second asks the first, who knows somebody else but does not ask for whom it is asked by itself.
    publish(third, SAMPLE)
    assert first.client().get(narinfo(SAMPLE)).status == 200
    found = second.client().get(narinfo(SAMPLE))
    assert found.status == 200, "what the first did not say to itself was taken for an absence"
    assert second.client().get(url_of_nar(found.text)).body == SAMPLE.file
    # Where everybody was asked, it is an absence.
    assert first.client().get(narinfo(OTHER)).status == 404
    publish(third, OTHER)
    assert first.client().get(narinfo(OTHER)).status == 404
    assert "could not answer" not in first.log + second.log


def test_what_nobody_has_any_more_is_absent_in_the_end(servers: list[Server]) -> None:
    """That each of them has heard of it from the other keeps it nowhere."""
    first, second, third = servers
    publish(third, SAMPLE)
    urls = {server: url_of_nar(server.client().get(narinfo(SAMPLE)).text) for server in (first, second)}
    third.stop()
    shutil.rmtree(third.data_dir)
    third.start()
    for server, url in urls.items():
        assert server.client().get(url).status == 404
        assert server.client().get(narinfo(SAMPLE)).status == 404
