"""Two servers that know nothing of each other, and publish into one bucket."""

from __future__ import annotations

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.nix import narinfo
from cachesrv.nix.compression import decompress
from cachesrv.nix.hashes import Hash
from tests.samples import Sample
from tests.system import fault_proxy
from tests.system.fault_proxy import FaultProxy
from tests.system.nix import CHAIN
from tests.system.push import push
from tests.system.server import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, MakeClient, StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server
    from tests.system.stored import Bucket

SMALL, IN_PARTS = 100_000, 12 * 2**20
"""Bytes of contents: of a NAR that goes in one request, and of one that goes in parts."""

COMPRESSORS = (zstandard.ZstdCompressor(1), zstandard.ZstdCompressor(1, write_checksum=True))


@pytest.fixture
def proxy(gateway: Gateway) -> Iterator[FaultProxy]:
    """In front of what the first of the servers sees of the bucket."""
    with FaultProxy(gateway.endpoint) as proxy:
        yield proxy


@pytest.fixture
def stored(make_bucket: MakeBucket) -> Bucket:
    return make_bucket("proxy")


@pytest.fixture
def servers(make_server: StartServer, stored: Bucket, proxy: FaultProxy) -> list[Server]:
    environment = {"CACHESRV_DELIVERY__DISK_CACHE_SIZE": "1 GiB"}
    through_proxy = environment | {"CACHESRV_STORAGE__ENDPOINT": proxy.url}
    return [make_server(stored=stored, environment=settings).start() for settings in (through_proxy, environment)]


def sample(name: str, size: int) -> Sample:
    return Sample(name, random.Random(name).randbytes(size))


def nar_name(sample: Sample) -> str:
    return f"{sample.nar_hash.bare_nix32}.nar.zst"


def send(server: Server, sample: Sample, compressor: zstandard.ZstdCompressor) -> None:
    """The NAR, called by the hash of its contents and compressed in some way, and then the path."""
    url = f"/main/nar/{nar_name(sample)}"
    assert server.pusher.put(url, compressor.compress(sample.nar)).status == 204
    path = {"path": str(sample.path), "nar_hash": sample.nar_hash.nix32, "nar_size": len(sample.nar), "references": []}
    answer = server.pusher.ask("POST", "/api/v1/caches/main/paths", json.dumps({"paths": [path]}).encode())
    assert json.loads(answer.body)["outcomes"][0].get("error") is None


def check(stored: Bucket, servers: list[Server], *samples: Sample) -> None:
    """There is one object of each NAR, and all narinfos are about that."""
    assert stored.names("nar/") == {f"nar/{nar_name(sample)}" for sample in samples}
    for one in samples:
        file = stored.read(f"nar/{nar_name(one)}")
        assert decompress("zstd", file, len(one.nar)) == one.nar
        texts = [server.client().get(one.narinfo_url).body for server in servers]
        for text in (*texts, stored.read(f"{one.path.hash_part}.narinfo")):
            info = narinfo.parse(text)
            assert (info.file_hash, info.file_size) == (Hash("sha256", sha256(file).digest()), len(file))
        for server in servers:
            assert server.client().get(f"/main/nar/{nar_name(one)}").body == file


@pytest.mark.parametrize("size", [SMALL, IN_PARTS], ids=["small", "in-parts"])
def test_both_push_the_same_at_once(servers: list[Server], stored: Bucket, size: int) -> None:
    samples = [sample(f"sample-{number}", size) for number in range(3)]
    for one in samples:
        with ThreadPoolExecutor() as pushers:
            list(pushers.map(send, servers, (one, one), COMPRESSORS))
    check(stored, servers, *samples)
    assert not stored.uploads()


@pytest.mark.parametrize("size", [SMALL, IN_PARTS], ids=["small", "in-parts"])
def test_one_of_them_is_overtaken(servers: list[Server], stored: Bucket, proxy: FaultProxy, size: int) -> None:
    """What it was sure that nobody had is there when it is about to write it; or the other one waits for it."""
    one = sample("sample", size)
    overtaken = threading.Event()
    method, query = ("PUT", "") if size == SMALL else ("POST", "uploadId")
    proxy.plan(fault_proxy.Hold(overtaken), path=nar_name(one), method=method, query=query)
    with ThreadPoolExecutor() as pushers:
        slow = pushers.submit(send, servers[0], one, COMPRESSORS[0])
        until(lambda: not proxy.waiting, "the first does not come to the end")
        quick = pushers.submit(send, servers[1], one, COMPRESSORS[1])
        with suppress(TimeoutError):
            quick.result(5)
        overtaken.set()
        slow.result()
        quick.result()
    check(stored, servers, one)


def test_a_closure_of_nix(builder: Nix, make_server: StartServer, stored: Bucket, make_client: MakeClient) -> None:
    """By two uploaders to two servers; each serves all of it, and so does the bucket."""
    environment = {"CACHESRV_SERVER__STORE_DIR": builder.store_dir}
    caches = [make_server(stored=stored, environment=environment).start() for _ in range(2)]
    # Nix knows one key of a name, and either may sign: nodes of one cache have the same.
    caches[1].stop()
    shutil.copytree(caches[0].data_dir / "keys", caches[1].data_dir / "keys", dirs_exist_ok=True)
    caches[1].start()
    paths = [*builder.build(CHAIN, "program"), builder.add("large", random.Random(1).randbytes(IN_PARTS))]
    with ThreadPoolExecutor() as pushers:
        assert [done["failed"] for done in pushers.map(lambda cache: push(builder, cache, *paths), caches)] == [0, 0]
    assert len(stored.names("nar/")) == 4
    for cache in caches:
        client = make_client(cache)
        client.run("nix", "copy", "--from", cache.main, *paths)
        assert client.hashes(*paths) == builder.hashes(*paths)
    by_bucket = make_client(caches[0])
    by_bucket.configure(trusted_public_keys=caches[0].public_key)
    by_bucket.run("nix", "copy", "--from", f"file://{stored.copy()}", *paths)
