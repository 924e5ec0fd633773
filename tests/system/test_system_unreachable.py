"""A bucket that does not answer: what is known is served as ever, and what is not is neither there nor absent."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample
from tests.system import fault_proxy
from tests.system.fault_proxy import SLOW_DOWN, FaultProxy
from tests.system.server import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, StartServer
    from tests.system.server import Server
    from tests.system.stored import Bucket

TIMEOUT = 1
KNOWN, KNOWN_ABSENT = Sample("known", b"known"), Sample("known-absent", b"known-absent")
UNKNOWN, UNKNOWN_ABSENT = Sample("unknown", b"unknown"), Sample("unknown-absent", b"unknown-absent")


@pytest.fixture
def proxy(gateway: Gateway) -> Iterator[FaultProxy]:
    with FaultProxy(gateway.endpoint) as proxy:
        yield proxy


@pytest.fixture
def bucket_of_others(make_bucket: MakeBucket, proxy: FaultProxy) -> Bucket:
    return make_bucket("proxy", endpoint=proxy.url)


@pytest.fixture
def server(make_server: StartServer, bucket_of_others: Bucket, proxy: FaultProxy) -> Server:
    """One path was pushed, and answered for, as was one that is absent; another one has come without the server."""
    environment = {
        "CACHESRV_CACHE__0__AUTHORITY": "bucket",
        "CACHESRV_LOOKUP__TIMEOUT": str(TIMEOUT),
        "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "1 GiB",
    }
    server = make_server(stored=bucket_of_others, environment=environment).start()
    assert server.pusher.put(KNOWN.nar_url, KNOWN.file).status == 204
    assert server.pusher.put(KNOWN.narinfo_url, KNOWN.narinfo()).status == 204
    answered(server, [200, 404], KNOWN, KNOWN_ABSENT)
    until(lambda: server.absences == 1, "the absence is not remembered")
    bucket_of_others.write(f"nar/{UNKNOWN.nar_name}", UNKNOWN.file)
    bucket_of_others.write(f"{UNKNOWN.path.hash_part}.narinfo", UNKNOWN.narinfo())
    proxy.calm()
    return server


def statuses(server: Server, *samples: Sample) -> list[int]:
    return [server.client().get(sample.narinfo_url).status for sample in samples]


def answered(server: Server, expected: list[int], *samples: Sample) -> None:
    """In the end: on a busy machine a bucket that is there may take longer, too, than the server waits for."""
    until(lambda: statuses(server, *samples) == expected, f"the answers are not {expected}")


def check_what_is_known(server: Server) -> None:
    for _ in range(20):
        assert statuses(server, KNOWN, KNOWN_ABSENT) == [200, 404]
        assert server.client().get(KNOWN.nar_url).body == KNOWN.file


FAULTS = {
    "hangs": fault_proxy.Hang(),
    "drops": fault_proxy.Drop(),
    "slow-down": fault_proxy.Answer(503, SLOW_DOWN),
    "not-found-by-a-proxy": fault_proxy.Answer(404, b"<html>not found</html>"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_is_not_known_may_be_asked_again(server: Server, proxy: FaultProxy, fault: fault_proxy.Fault) -> None:
    proxy.plan(fault, times=100_000)
    for sample in (UNKNOWN, UNKNOWN_ABSENT):
        for path in (sample.narinfo_url, sample.nar_url):
            answer = server.client().get(path)
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.headers["cache-control"] == "no-store"
    check_what_is_known(server)
    assert server.absences == 1
    server.kill()
    proxy.calm()
    server.start()
    answered(server, [200, 404, 200, 404], KNOWN, KNOWN_ABSENT, UNKNOWN, UNKNOWN_ABSENT)
    until(lambda: server.client().get(UNKNOWN.nar_url).body == UNKNOWN.file, "the NAR does not come")


@pytest.mark.parametrize(("answer", "words"), fault_proxy.REFUSALS.values(), ids=fault_proxy.REFUSALS)
def test_a_bucket_that_refuses_is_no_empty_bucket(
    server: Server, proxy: FaultProxy, answer: fault_proxy.Answer, words: str
) -> None:
    """403 is what S3 says when the credentials are wrong, and also of what is absent to those who may not list."""
    proxy.plan(answer, times=100_000)
    answered(server, [500, 500], UNKNOWN, UNKNOWN_ABSENT)
    check_what_is_known(server)
    assert server.absences == 1
    assert server.pusher.put(UNKNOWN_ABSENT.nar_url, UNKNOWN_ABSENT.file).status == 500
    for path in (UNKNOWN.narinfo_url, UNKNOWN_ABSENT.nar_url):
        (told,) = [line for line in server.log.splitlines() if path in line]
        assert words in json.loads(told)["error"]
    proxy.calm()
    assert statuses(server, UNKNOWN, UNKNOWN_ABSENT) == [200, 404]


def test_all_recovers_by_itself(server: Server, proxy: FaultProxy) -> None:
    """Also what was asked so often that nobody asks the bucket any more for a while."""
    proxy.down()
    others = [Sample(f"other-{number}") for number in range(10)]
    assert set(statuses(server, UNKNOWN, UNKNOWN_ABSENT, *others)) == {503}
    assert server.pusher.put(others[0].nar_url, others[0].file).status == 503
    check_what_is_known(server)
    proxy.up()
    until(lambda: statuses(server, UNKNOWN) == [200], "the bucket is not asked again")
    answered(server, [404] * 11, UNKNOWN_ABSENT, *others)
    assert server.pusher.put(others[0].nar_url, others[0].file).status == 204


def test_nobody_waits_for_those_who_wait(server: Server, proxy: FaultProxy) -> None:
    """Many questions that hang hold up none that can be answered, and end in time."""
    proxy.plan(fault_proxy.Hang(), times=100_000)
    others = [Sample(f"other-{number}") for number in range(100)]
    begun = time.monotonic()
    with ThreadPoolExecutor(len(others)) as askers:
        asked = askers.map(lambda other: statuses(server, other)[0], others)
        until(lambda: len(proxy.seen) > 10, "the bucket is not asked")
        check_what_is_known(server)
        assert set(asked) == {503}
    assert time.monotonic() - begun < 20, "they waited for the bucket, and not for the time-out"
