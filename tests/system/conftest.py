"""Real processes: `cachesrv serve`, `cachesrv push`, and the installed Nix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING

import pytest

from tests.system.nix import Nix
from tests.system.push import by_copy, by_push
from tests.system.server import Server
from tests.system.stored import Bucket, Stored

if TYPE_CHECKING:
    from pathlib import Path

    from tests.radosgw import Gateway

StartServer = Callable[..., Server]
MakeNix = Callable[..., Nix]
MakeClient = Callable[[Server], Nix]
MakeBucket = Callable[..., Bucket]

FILES, REDIRECT, PROXY = "files", "redirect", "proxy"


@pytest.fixture
def make_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> MakeBucket:
    """Places in buckets, each of its own; see Bucket for what they are given."""

    def make(mode: str = "", endpoint: str = "") -> Bucket:
        gateway: Gateway = request.getfixturevalue("gateway")
        bucket: str = request.getfixturevalue("bucket")
        return Bucket(gateway, bucket, token_hex(8), tmp_path, mode=mode, endpoint=endpoint)

    return make


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> str:
    """What servers keep objects in, and how NARs reach clients from there: in files, unless a test is made for others
    (`every_storage`, `both_storages`).
    """
    return getattr(request, "param", FILES)


every_storage = pytest.mark.parametrize("storage", [FILES, REDIRECT, PROXY], indirect=True)
both_storages = pytest.mark.parametrize("storage", [FILES, REDIRECT], indirect=True)
both_ways_and_storages = pytest.mark.parametrize(
    ("storage", "fill"), [(FILES, by_copy), (REDIRECT, by_push)], indirect=["storage"]
)
"""For what has to do with each of them by itself: the matrix would show everything twice."""


@pytest.fixture
def make_server(tmp_path: Path, storage: str, make_bucket: MakeBucket) -> Iterator[StartServer]:
    """Servers, each with a folder of its own; not yet started."""
    servers: list[Server] = []

    def make(
        *,
        environment: dict[str, str] | None = None,
        config: str | None = None,
        listen: str = "127.0.0.1:0",
        data_dir: Path | None = None,
        stored: Stored | None = None,
    ) -> Server:
        folder = tmp_path / f"server-{len(servers)}"
        stored = stored or (None if storage == FILES else make_bucket(storage))
        server = Server(folder, environment=environment, config=config, listen=listen, data_dir=data_dir, stored=stored)
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.dispose()


@pytest.fixture
def server(make_server: StartServer) -> Server:
    """A server as it is when it is started with nothing."""
    return make_server().start()


@pytest.fixture
def make_nix(tmp_path: Path) -> MakeNix:
    """Machines with Nix."""
    numbers = count()

    def make(*, builds: bool = False, store_dir: str = "/nix/store") -> Nix:
        return Nix(tmp_path / f"nix-{next(numbers)}", builds=builds, store_dir=store_dir)

    return make


@pytest.fixture
def nix(make_nix: MakeNix) -> Nix:
    """A machine with an empty store in the usual store directory."""
    return make_nix()


@pytest.fixture
def builder(make_nix: MakeNix) -> Nix:
    """A machine that builds."""
    return make_nix(builds=True)


@pytest.fixture
def cache(builder: Nix, make_server: StartServer) -> Server:
    """A server for what the builder builds, whose token the builder has in netrc."""
    server = make_server(environment={"CACHESRV_SERVER__STORE_DIR": builder.store_dir}).start()
    builder.log_in(server.token)
    return server


@pytest.fixture
def client(cache: Server, make_client: MakeClient) -> Nix:
    """Another machine, that has nothing but that cache."""
    return make_client(cache)


@pytest.fixture
def make_client(builder: Nix, make_nix: MakeNix) -> MakeClient:
    """Machines that cannot build, and have nothing but a cache for what the builder builds."""

    def make(cache: Server) -> Nix:
        client = make_nix(store_dir=builder.store_dir)
        client.configure(substituters=cache.main, trusted_public_keys=cache.public_key, max_jobs="0")
        return client

    return make
