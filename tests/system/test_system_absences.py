"""What is not in a bucket is asked of it once: counted at a proxy between the server and the bucket."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample, path_of
from tests.system.client import whole
from tests.system.fault_proxy import FaultProxy
from tests.system.server import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, StartServer
    from tests.system.server import Server

ABSENT = 10_000
CONNECTIONS = 16
NARINFO = ".narinfo"


@pytest.fixture
def proxy(gateway: Gateway) -> Iterator[FaultProxy]:
    with FaultProxy(gateway.endpoint) as proxy:
        yield proxy


@pytest.fixture
def server(
    request: pytest.FixtureRequest, make_server: StartServer, make_bucket: MakeBucket, proxy: FaultProxy
) -> Server:
    environment = {"CACHESRV_CACHE__0__AUTHORITY": "bucket", **getattr(request, "param", {})}
    return make_server(stored=make_bucket(endpoint=proxy.url), environment=environment).start()


def ask(server: Server, hash_parts: list[str]) -> list[int]:
    """The statuses of their narinfos, asked for one after the other on each of several connections."""

    def one_after_the_other(some: list[str]) -> list[int]:
        with closing(server.client().open()) as connection:
            statuses = []
            for hash_part in some:
                connection.request("GET", f"/main/{hash_part}.narinfo")
                statuses.append(whole(connection.getresponse()).status)
            return statuses

    parts = [hash_parts[start::CONNECTIONS] for start in range(CONNECTIONS)]
    with ThreadPoolExecutor(CONNECTIONS) as askers:
        return [status for statuses in askers.map(one_after_the_other, parts) for status in statuses]


def test_each_is_asked_for_once(server: Server, proxy: FaultProxy) -> None:
    samples = [Sample(f"sample-{number}") for number in range(3)]
    hash_parts = [path_of(f"absent-{number}").hash_part for number in range(ABSENT - len(samples))]
    hash_parts += [sample.path.hash_part for sample in samples]
    assert ask(server, hash_parts) == [404] * ABSENT
    assert proxy.count(path=NARINFO) == proxy.count("GET", path=NARINFO) == ABSENT
    until(lambda: server.absences == ABSENT, "not all absences are remembered")
    proxy.calm()
    assert ask(server, hash_parts) == [404] * ABSENT
    server.kill()
    server.start()
    assert ask(server, hash_parts) == [404] * ABSENT
    assert not proxy.count(path=NARINFO)
    for sample in samples:
        assert server.pusher.put(sample.nar_url, sample.file).status == 204
        assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204
        proxy.calm()
        assert server.client().get(sample.narinfo_url).status == 200
        assert not proxy.count(path=NARINFO)
    assert server.absences == ABSENT - len(samples)


@pytest.mark.parametrize("server", [{"CACHESRV_LOOKUP__NEGATIVE_LIMIT": "50"}], indirect=True, ids=["50"])
def test_their_number_is_bounded(server: Server, proxy: FaultProxy) -> None:
    """The latest are remembered."""
    hash_parts = [path_of(f"absent-{number}").hash_part for number in range(200)]
    first, rest = hash_parts[:100], hash_parts[100:]
    assert ask(server, first) == [404] * len(first)
    assert server.stop() == 0  # nothing is still to be learnt then
    second = int(time.time())
    until(lambda: time.time() >= second + 1, "time stands still")  # what ends together goes in the order of its names
    server.start()
    assert server.absences == 50
    assert ask(server, rest) == [404] * len(rest)
    assert server.stop() == 0
    server.start()
    assert server.absences == 50
    proxy.calm()
    assert ask(server, first[:20]) == [404] * 20
    assert proxy.count(path=NARINFO) == 20


def test_what_others_have_deleted_can_be_pushed_again(make_server: StartServer) -> None:
    server = make_server(environment={"CACHESRV_CACHE__0__AUTHORITY": "bucket"}).start()
    sample = Sample("sample")
    name = f"/main/{sample.path.hash_part}{NARINFO}"
    question = {"paths": [[sample.path.base_name, sample.info.nar_hash.nix32, sample.info.nar_size]]}

    def missing() -> list[str]:
        answer = server.pusher.ask("POST", "/api/v1/caches/main/missing", json.dumps(question).encode())
        return [*json.loads(answer.body)["missing"]]

    def push() -> None:
        assert server.pusher.put(f"/main/nar/{sample.nar_name}", sample.file).status == 204
        assert server.pusher.put(name, sample.narinfo()).status == 204

    push()
    assert missing() == []
    server.stop()
    for file in (f"nar/{sample.nar_name}", f"{sample.path.hash_part}{NARINFO}"):
        next(path for path in server.objects.parent.rglob(file)).unlink()
    shutil.rmtree(server.data_dir / "index")
    server.start()
    assert missing() == [sample.path.base_name]
    assert server.client().get(name).status == 404, "the question made it visible again"
    push()
    assert missing() == []
    assert server.client().get(name).status == 200
    assert server.client().get(f"/main/nar/{sample.nar_name}").body == sample.file
