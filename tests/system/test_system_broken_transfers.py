"""NARs that come from a bucket cut or altered: no client gets one as a complete answer, and none is kept."""

from __future__ import annotations

from http.client import HTTPException
from secrets import token_hex
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample
from tests.system import fault_proxy
from tests.system.fault_proxy import FaultProxy
from tests.system.nix import CHAIN
from tests.system.server import Server
from tests.system.stored import Bucket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, MakeClient, StartServer
    from tests.system.nix import Nix

MIB = 2**20
SMALL = Sample("small", bytes(range(256)) * 400)
LARGE = Sample("large", bytes(range(256)) * (12 * MIB // 256))
FAULTS: dict[str, fault_proxy.Fault] = {
    "cut": fault_proxy.Truncate(70_000),
    "half-closed": fault_proxy.Truncate(70_000, half=True),
    "altered": fault_proxy.Alter(70_000),
    "altered-at-the-end": fault_proxy.Alter(-1),
    "of-another-length": fault_proxy.Answer(200, SMALL.file[:-10], {"ETag": "x"}),
}


@pytest.fixture(scope="module")
def shared_proxy(gateway: Gateway) -> Iterator[FaultProxy]:
    with FaultProxy(gateway.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> FaultProxy:
    shared_proxy.calm()
    return shared_proxy


@pytest.fixture(scope="module", params=["1 GiB", "0"], ids=["disk-cache", "no-disk-cache"])
def shared_server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    gateway: Gateway,
    bucket: str,
    shared_proxy: FaultProxy,
) -> Iterator[Server]:
    """Two NARs were pushed to it; they lie in the bucket."""
    folder = tmp_path_factory.mktemp("server")
    stored = Bucket(gateway, bucket, token_hex(8), folder, mode="proxy", endpoint=shared_proxy.url)
    server = Server(folder, stored=stored, environment={"CACHESRV_DELIVERY__DISK_CACHE_SIZE": request.param}).start()
    for sample in (SMALL, LARGE):
        assert server.pusher.put(sample.nar_url, sample.file).status == 204
        assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204
    yield server
    server.dispose()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """They do not lie on its own disk."""
    shared_server.forget_nars()
    return shared_server


def kept(server: Server) -> list[bytes]:
    """What its disk cache holds."""
    return [file.read_bytes() for file in (server.data_dir / "nar-cache").rglob("*.nar")]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_answer_looks_whole(server: Server, proxy: FaultProxy, fault: fault_proxy.Fault) -> None:
    for sample in (SMALL, LARGE):
        proxy.plan(fault, method="GET", path=sample.nar_name, times=100_000)
        for headers in ({}, {"Range": "bytes=0-"}, {"Range": f"bytes=0-{len(sample.file) - 1}"}):
            try:
                answer = server.client().get(sample.nar_url, **headers)
            except (HTTPException, ConnectionError):
                continue
            # What breaks is asked for again from there.
            assert answer.body == sample.file or answer.status >= 500, "a broken transfer looks whole"
        assert all(content == sample.file for content in kept(server))
        proxy.calm()
        assert server.client().get(sample.nar_url).body == sample.file
        server.forget_nars()


@pytest.mark.parametrize("half", [False, True], ids=["cut", "half-closed"])
def test_a_transfer_that_breaks_now_and_then_ends_well(server: Server, proxy: FaultProxy, half: bool) -> None:
    for after in (0, 1, MIB, 5 * MIB):
        proxy.plan(fault_proxy.Truncate(after, half=half), method="GET", path=LARGE.nar_name)
    assert server.client().get(LARGE.nar_url).body == LARGE.file
    gets = [seen for seen in proxy.seen if seen.method == "GET" and seen.path.endswith(LARGE.nar_name)]
    asked = [seen.headers.get("Range", "bytes=0-") for seen in gets]
    starts = [int(part.removeprefix("bytes=").partition("-")[0]) for part in asked]
    assert len(starts) == 5
    assert starts == sorted(starts)
    assert starts[-1] > MIB


def test_nix_gets_what_was_built(
    builder: Nix, make_server: StartServer, make_bucket: MakeBucket, make_client: MakeClient, proxy: FaultProxy
) -> None:
    """Through a network that breaks."""
    environment = {
        "CACHESRV_SERVER__STORE_DIR": builder.store_dir,
        "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "1 GiB",
    }
    cache = make_server(stored=make_bucket("proxy", endpoint=proxy.url), environment=environment).start()
    builder.log_in(cache.token)
    program, large = builder.build(CHAIN, "program")[0], builder.add("large", LARGE.content)
    builder.run("nix", "copy", "--to", f"{cache.main}?compression=none", program, large)
    cache.forget_nars()
    for fault in (fault_proxy.Truncate(100), fault_proxy.Drop(), fault_proxy.Truncate(0, half=True)):
        proxy.plan(fault, method="GET", path="/nar/", times=2)
    client = make_client(cache)
    client.run("nix", "copy", "--from", cache.main, program, large)
    assert client.hashes(program, large) == builder.hashes(program, large)
    assert not proxy.waiting
