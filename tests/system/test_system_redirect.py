"""NARs in a bucket, to which clients are sent unless it is configured otherwise: all of a redirect that HTTP shows."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.samples import Sample

if TYPE_CHECKING:
    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, StartServer
    from tests.system.server import Server

SAMPLE = Sample("sample", bytes(range(256)) * 4096)


@pytest.fixture
def server(make_server: StartServer, make_bucket: MakeBucket) -> Server:
    server = make_server(stored=make_bucket(), environment={"CACHESRV_DELIVERY__PRESIGN_SECONDS": "600"}).start()
    publish(server, SAMPLE)
    return server


def publish(server: Server, sample: Sample) -> None:
    assert server.pusher.put(sample.nar_url, sample.file).status == 204
    assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204


def test_a_nar_is_where_the_redirect_leads_to(server: Server) -> None:
    client = server.client()
    answer = client.ask("GET", SAMPLE.nar_url)
    assert (answer.status, answer.headers["cache-control"]) == (307, "no-store")
    url = urlsplit(answer.headers["location"])
    assert url.path.endswith(SAMPLE.nar_url)
    assert parse_qs(url.query)["X-Amz-Expires"] == ["600"]
    assert client.get(SAMPLE.nar_url).body == SAMPLE.file
    part = client.get(SAMPLE.nar_url, Range="bytes=1000-")
    assert (part.status, part.body) == (206, SAMPLE.file[1000:])


def test_what_can_be_said_is_said_here(server: Server) -> None:
    """A URL is signed for one method, and nobody is sent to what is not there."""
    head = server.client().head(SAMPLE.nar_url)
    assert (head.status, head.headers["content-length"]) == (200, str(len(SAMPLE.file)))
    absent = Sample("absent", b"absent")
    for method in ("GET", "HEAD"):
        assert server.client().ask(method, absent.nar_url).status == 404


def test_what_was_just_pushed_does_not_come_from_the_bucket(make_server: StartServer, make_bucket: MakeBucket) -> None:
    """It is on this host still."""
    server = make_server(stored=make_bucket(), environment={"CACHESRV_DELIVERY__DISK_CACHE_SIZE": "1 GiB"}).start()
    publish(server, SAMPLE)
    answer = server.client().ask("GET", SAMPLE.nar_url)
    assert (answer.status, answer.body) == (200, SAMPLE.file)


def test_a_password_does_not_reach_the_bucket(
    make_server: StartServer, make_bucket: MakeBucket, gateway: Gateway
) -> None:
    """Clients take it from netrc by the name of the host, and a bucket may be at another port of the same one."""
    server = make_server(stored=make_bucket(endpoint=gateway.endpoint)).start()
    publish(server, SAMPLE)
    assert server.client().ask("GET", SAMPLE.nar_url).status == 307
    answer = server.pusher.ask("GET", SAMPLE.nar_url)
    assert (answer.status, answer.body) == (200, SAMPLE.file)
