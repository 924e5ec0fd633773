"""The front by itself: who answers, in which order, how much may wait, how long a connection lives, how it ends."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import monotonic, time
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import StoreError
from cachesrv.index.base import IndexEntry
from cachesrv.services.answer import present
from cachesrv.web.fast import MANY_SLOW, SMALL_NAR, FastAnswers
from cachesrv.web.front import Front, Fronts
from cachesrv.web.plain import MAX_BLOCK, Blocks
from cachesrv.web.reactor import Reactor
from tests import certificate
from tests.exchange import Connection, parse
from tests.front_site import (
    ABSENT,
    ENDED,
    IN_CATALOG,
    LARGE,
    MEDIUM,
    NARS,
    PRESENT,
    READER,
    STRANGER,
    UNKNOWN,
    front_server,
    nar,
    narinfo,
    open_site,
)
from tests.waiting import Pace, until

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from cachesrv.web.site import Site
    from tests.front_site import Served

pytestmark = pytest.mark.long

HIT = f"/main/{PRESENT[0]}.narinfo"
LARGE_NAR = f"/main/nar/{next(name for name, size in NARS.items() if size == LARGE)}"
MEDIUM_NAR = f"/main/nar/{next(name for name, size in NARS.items() if size == MEDIUM)}"
SMALL_SOCKET = 16 * 1024
AT_ONCE = 20
"""Seconds, however busy this machine is: less than what a server would wait for that waits."""
KERNEL = 6 * 2**20
"""More than the kernel keeps of what is sent to a server that does not read."""


def request(target: str, *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: cache.test", *fields, "", ""]).encode()


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


@pytest.fixture
async def served(site: Site) -> AsyncIterator[Served]:
    async with front_server(site) as served:
        yield served


BY = pytest.mark.parametrize("by_reactor", [False, True], ids=["front", "reactor"])
"""With and without the loop that stands before the front: what holds for one has to hold for both."""


@pytest.fixture(autouse=True)
def nothing_is_wrong(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asyncio and aiohttp log what no caller gets to see."""
    yield
    assert not [
        record.getMessage() for record in caplog.get_records("call") if record.levelname in {"ERROR", "CRITICAL"}
    ]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each request that was not left to aiohttp from the start: whether the front answered it."""
    asked: list[bool] = []
    answer = FastAnswers.answer

    def watched(self: FastAnswers, data: bytes) -> bytes | None:
        found = answer(self, data)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(FastAnswers, "answer", watched)
    return asked


class TestWhoAnswers:
    async def test_what_is_known_is_answered_by_the_front(self, served: Served, ours: list[bool]) -> None:
        connection = await Connection.open(served.port)
        small = f"/nar/{list(NARS)[2]}"
        for target, status in ((HIT, b"200"), (f"/{ABSENT[0]}.narinfo", b"404"), (small, b"200")):
            for method in ("GET", "HEAD"):
                assert (await connection.ask(request(target, method=method))).startswith(b"HTTP/1.1 " + status)
        assert ours == [True] * 6
        connection.close()

    async def test_after_aiohttp_has_answered_the_front_answers_again(self, served: Served, ours: list[bool]) -> None:
        connection = await Connection.open(served.port)
        for target in (f"/{UNKNOWN}.narinfo", LARGE_NAR, "/", "/nowhere", f"/team/{PRESENT[0]}.narinfo"):
            await connection.ask(request(target), request(HIT))
        await connection.ask(request(HIT, "If-None-Match: *"), request(HIT))
        assert ours == [False, True] * 6
        connection.close()

    async def test_after_anything_else_aiohttp_keeps_the_connection(self, served: Served, ours: list[bool]) -> None:
        for unusual in (request(HIT, "X-Unheard-Of: 1"), request(HIT, "Content-Length: 0"), request("/", method="PUT")):
            connection = await Connection.open(served.port)
            await connection.ask(request(HIT), unusual, request(HIT))
            connection.close()
        assert ours == [True, False] * 3

    async def test_an_absence_that_has_ended_is_looked_up(self, site: Site) -> None:
        answers = FastAnswers(site)
        assert answers.answer(request(f"/{ABSENT[0]}.narinfo")) is not None
        assert answers.answer(request(f"/{ENDED}.narinfo")) is None
        for clock in (time() + 4000, time() - 86_400):
            answers.now = clock
            assert answers.answer(request(f"/{ABSENT[0]}.narinfo")) is None

    async def test_what_is_published_is_found_by_the_next_request(self, site: Site) -> None:
        answers = FastAnswers(site)
        missed = answers.answer(request(f"/{ABSENT[0]}.narinfo"))
        assert missed is not None
        site.services.index.put([IndexEntry("main", ABSENT[0], present(b"StorePath: x\n"))])
        found = answers.answer(request(f"/{ABSENT[0]}.narinfo"))
        assert found is not None
        assert found.endswith(b"StorePath: x\n")

    async def test_what_the_index_cannot_say_is_left_to_the_handlers(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: bytes) -> bytes:
            raise StoreError("the index is damaged")

        monkeypatch.setattr(site.services.index, "raw", fail)
        async with front_server(site) as served:
            connection = await Connection.open(served.port)
            # They ask the catalog, which knows nothing here.
            assert (await connection.ask(request(HIT))).startswith(b"HTTP/1.1 404 ")
            assert (await connection.ask(request("/nix-cache-info"))).startswith(b"HTTP/1.1 200 ")
            connection.close()
        caplog.clear()

    async def test_new_rules_hold_for_the_next_request(self, site: Site) -> None:
        answers = FastAnswers(site)
        team = request(f"/team/{PRESENT[0]}.narinfo")
        open_ = request(f"/open/{PRESENT[0]}.narinfo")
        root = request(f"/{PRESENT[0]}.narinfo")
        assert [answers.answer(data) is not None for data in (team, open_, root)] == [False, True, True]
        caches = dict(site.rules.caches)
        caches["team"] = replace(caches["team"], public=True)
        del caches["open"]
        site.rules = replace(site.rules, caches=caches, root=None)
        assert [answers.answer(data) is not None for data in (team, open_, root)] == [True, False, False]

    async def test_who_may_read_a_private_cache(self, site: Site) -> None:
        answers = FastAnswers(site)

        def answered(*fields: str) -> bool:
            nar_name = list(NARS)[1]
            found = {
                answers.answer(request(f"/team/{target}", *fields)) is not None
                for target in (f"{PRESENT[0]}.narinfo", f"{ABSENT[0]}.narinfo", f"nar/{nar_name}")
            }
            assert len(found) == 1
            return found.pop()

        assert answered(bearer(READER))
        assert answered("authorization:  bEARER " + READER)
        assert not any(
            map(answered, (bearer(STRANGER), bearer("nobody"), "Authorization: Bearer", "X-A: b", "Accept: a"))
        )
        assert not answered(bearer(IN_CATALOG)), "nobody has verified it yet"
        await site.rules.access.require(IN_CATALOG, "pull", "team")
        assert answered(bearer(IN_CATALOG))

    async def test_use_is_noted(self, site: Site) -> None:
        answers = FastAnswers(site)
        for target in (f"/{PRESENT[0]}.narinfo", f"/open/{PRESENT[1]}.narinfo", f"/{ABSENT[0]}.narinfo"):
            answers.answer(request(target))
        assert site.services.usage._gathered == {f"main/{PRESENT[0]}".encode(), f"open/{PRESENT[1]}".encode()}

    async def test_the_date_goes_on(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = FastAnswers(site)
        for now, date in ((1_000_000_000, b"Sun, 09 Sep 2001 01:46:40 GMT"), (2**31, b"Tue, 19 Jan 2038 03:14:08 GMT")):
            monkeypatch.setattr("cachesrv.web.fast.time.time", lambda now=now: float(now))
            answers.tick()
            for target in (HIT, f"/nar/{list(NARS)[1]}"):
                assert b"\r\nDate: %b\r\n" % date in (answers.answer(request(target)) or b"")

    async def test_the_second_is_that_of_the_clock(self, served: Served) -> None:
        connection = await Connection.open(served.port)
        dates = set()
        for _ in range(2):
            dates.add((await connection.ask(request(HIT))).split(b"Date: ")[1].split(b"\r\n")[0])
            await asyncio.sleep(1.05)
        assert len(dates) > 1
        connection.close()


def test_what_is_remembered_of_header_fields_is_bounded() -> None:
    blocks = Blocks()
    for number in range(5000):
        assert blocks.get(b"Host: h\r\nX-Request-Id: %d\r\n\r\n" % number) is not None
        assert blocks.get(b"X-%d\r\n\r\n" % number) is None
    assert blocks.get(b"Host: h\r\nAccept: %b\r\n\r\n" % (b"a" * MAX_BLOCK)) is None
    assert len(blocks._verdicts) <= 1024
    assert max(map(len, blocks._verdicts)) <= MAX_BLOCK


@BY
class TestOrder:
    @pytest.fixture
    async def served(self, site: Site, by_reactor: bool) -> AsyncIterator[Served]:
        async with front_server(site, by_reactor=by_reactor) as served:
            yield served

    @pytest.mark.parametrize("segment", [1, 7, 1000])
    async def test_a_thousand_requests_are_answered_in_order(self, served: Served, segment: int) -> None:
        numbers = [number % 4 for number in range(1000)]
        data = [request(f"/open/{PRESENT[number]}.narinfo") for number in numbers]
        connection = await Connection.open(served.port)
        sending = asyncio.create_task(
            connection.send(*(b"".join(data[start : start + segment]) for start in range(0, 1000, segment)))
        )
        await connection.receive_answers(["GET"] * 1000)
        await sending
        found = [part.split(b"-path-")[1][:1] for part in bytes(connection.received).split(b"StorePath: ")[1:]]
        assert found == [b"%d" % number for number in numbers]
        connection.close()

    async def test_slow_and_fast_answers_do_not_overtake_each_other(self, served: Served) -> None:
        connection = await Connection.open(served.port)
        targets = ["/nix-cache-info", HIT, LARGE_NAR, HIT, f"/{UNKNOWN}.narinfo", HIT] * 5
        await connection.send(*map(request, targets))
        await connection.receive_answers(["GET"] * len(targets))
        sizes = [int(part.split(b"\r\n")[0]) for part in bytes(connection.received).split(b"Content-Length: ")[1:]]
        assert sizes == sizes[:6] * 5
        assert sizes[2] == LARGE
        connection.close()


async def send_until_refused(connection: Connection, data: bytes, limit: int) -> int:
    """Send the same again and again, until it is not taken for a while or `limit` bytes are sent; how many were."""
    sent = 0
    with suppress(TimeoutError):
        while sent < limit:
            async with asyncio.timeout(0.5):
                await connection._loop.sock_sendall(connection.sock, data)
            sent += len(data)
            await asyncio.sleep(0)
    return sent


async def none_left(served: Served) -> None:
    """Wait until the server has no connections."""
    await until(lambda: not served.connections)


@BY
class TestWhoDoesNotRead:
    @pytest.fixture
    async def served(self, site: Site, by_reactor: bool) -> AsyncIterator[Served]:
        async with front_server(site, send_buffer=SMALL_SOCKET, by_reactor=by_reactor) as served:
            yield served

    @pytest.mark.parametrize(
        ("together", "target"),
        [(1, HIT), (1, f"/{ABSENT[0]}.narinfo"), (1, MEDIUM_NAR), (50, HIT), (50, "/"), (50, LARGE_NAR)],
    )
    async def test_gets_no_more_answers_made(self, served: Served, together: int, target: str) -> None:
        connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
        sent = await send_until_refused(connection, request(target) * together, 5 * KERNEL)
        assert sent < 5 * KERNEL
        assert served.unsent < 64 * 1024 + MEDIUM
        other = await Connection.open(served.port)
        assert (await other.ask(request(HIT))).startswith(b"HTTP/1.1 200 ")
        connection.close()
        other.close()

    @pytest.mark.parametrize("together", [1, 50])
    async def test_gets_all_answers_in_the_end(self, site: Site, served: Served, together: int) -> None:
        connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
        asked = 4000
        sending = asyncio.create_task(connection.send(*[request(HIT) * together] * (asked // together)))
        await asyncio.sleep(0.5)
        metrics = site.services.metrics
        assert metrics.cells[metrics.request_cell("GET", "narinfo", 200)] < asked / 2
        await connection.receive_answers(["GET"] * asked)
        await sending
        connection.close()

    @pytest.mark.parametrize("fields", [(), ("Range: bytes=0-262143",)])
    async def test_many_of_them_take_little_memory(self, site: Site, served: Served, fields: tuple[str, ...]) -> None:
        # In a private cache: what anybody may have is sent from its file.
        await site.services.storage.put("private/team/nar/just-small-enough.nar", bytes(SMALL_NAR))
        target, fields = "/team/nar/just-small-enough.nar", (bearer(READER), *fields)
        connections = [await Connection.open(served.port, receive_buffer=SMALL_SOCKET) for _ in range(200)]
        for connection in connections:
            await connection.send(request(target, *fields))
        await asyncio.sleep(0.3)
        assert served.unsent < (MANY_SLOW + 10) * SMALL_NAR
        for connection in connections[:5]:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
            await connection.receive_answers(["GET"])
            assert not any(bytes(connection.received).partition(b"\r\n\r\n")[2])
        for connection in connections:
            connection.close()
        await none_left(served)
        assert served.fronts._answers.slow == 0

    @pytest.mark.parametrize("target", [MEDIUM_NAR, LARGE_NAR])
    async def test_is_cut_off_in_the_end(
        self, site: Site, by_reactor: bool, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cachesrv.web.listen.STALLED_SECONDS", 1)
        async with front_server(site, send_buffer=SMALL_SOCKET, by_reactor=by_reactor) as served:
            connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
            begun = monotonic()
            await connection.send(request(target))
            await asyncio.sleep(0.5)
            assert served.connections == 1 or monotonic() - begun >= 1
            await none_left(served)
            connection.close()

    @pytest.mark.parametrize("target", [MEDIUM_NAR, LARGE_NAR])
    async def test_a_slow_reader_gets_a_nar_whole(self, served: Served, target: str) -> None:
        connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
        await connection.send(request(target))
        await asyncio.sleep(0.3)
        other = await Connection.open(served.port)
        content = nar(NARS[target.rpartition("/")[2]])
        assert (await other.ask(request(target))).endswith(content)
        await connection.receive_answers(["GET"])
        assert bytes(connection.received).endswith(content)
        await connection.ask(request(HIT))
        for each in (connection, other):
            each.close()


@BY
class TestIdleConnections:
    IDLE = 0.3

    @pytest.fixture
    async def served(self, site: Site, by_reactor: bool) -> AsyncIterator[Served]:
        async with front_server(site, idle_timeout=self.IDLE, by_reactor=by_reactor) as served:
            yield served

    @pytest.mark.parametrize("first", [None, request(HIT), request("/"), request("/", method="PUT")])
    async def test_are_closed(self, served: Served, first: bytes | None) -> None:
        begun = monotonic()
        connection = await Connection.open(served.port)
        if first:
            await connection.ask(first)
        assert await connection.ends()
        assert monotonic() - begun > 0.8 * self.IDLE
        assert served.connections == 0
        connection.close()

    @pytest.mark.parametrize("first", [None, request(HIT), request("/")])
    @pytest.mark.parametrize("target", [HIT, "/"])
    async def test_the_head_of_a_request_has_a_time_to_come_in(
        self, served: Served, first: bytes | None, target: str
    ) -> None:
        connection = await Connection.open(served.port)
        if first:
            await connection.ask(first)
        trickle = request(target, "X-Trickle: " + "x" * 1000)
        for byte in trickle:
            await connection.send(bytes([byte]))
            await connection.receive(0.05)
            if connection.ended:
                break
        assert connection.ended
        connection.close()

    async def test_a_head_that_comes_in_time_is_answered(self, served: Served) -> None:
        for _ in range(Pace.TRIES):
            connection, pace = await Connection.open(served.port), Pace(0.9 * self.IDLE)
            for segment in [request(HIT)[:20], request(HIT)[20:]] * 2:
                await asyncio.sleep(0.6 * self.IDLE)
                await connection.send(segment)
                pace.step()
            if pace.kept:
                await connection.receive_answers(["GET", "GET"])
                assert not connection.ended
            connection.close()
            if pace.kept:
                break

    @pytest.mark.parametrize("target", [HIT, "/"])
    async def test_a_connection_in_use_is_kept(self, served: Served, target: str) -> None:
        for _ in range(Pace.TRIES):
            connection, pace = await Connection.open(served.port), Pace(0.9 * self.IDLE)
            for _ in range(6):
                await connection.ask(request(target))
                await asyncio.sleep(self.IDLE / 2)
                pace.step()
            connection.close()
            if pace.kept:
                assert not connection.ended
                break

    async def test_a_body_on_its_way_is_no_idleness(self, site: Site, served: Served) -> None:
        connection = await Connection.open(served.port)
        await upload(connection, site, between=partial(asyncio.sleep, self.IDLE / 2))
        assert b" 204 " in connection.received
        connection.close()

    @pytest.mark.parametrize("target", [MEDIUM_NAR, LARGE_NAR])
    async def test_an_answer_on_its_way_is_no_idleness(self, site: Site, by_reactor: bool, target: str) -> None:
        options: dict[str, Any] = {"send_buffer": SMALL_SOCKET, "by_reactor": by_reactor}
        async with front_server(site, idle_timeout=self.IDLE, **options) as served:
            connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
            await connection.send(request(target))
            await asyncio.sleep(3 * self.IDLE)
            await connection.receive_answers(["GET"])
            assert not connection.ended
            connection.close()


def push_token(site: Site) -> str:
    """The one that `cachesrv serve` makes at its first start."""
    folder = site.services.storage._tree.root.parent  # type: ignore[attr-defined]  # the file store
    return str((folder / "push-token").read_text().strip())


async def upload(connection: Connection, site: Site, *, between: Callable[[], Awaitable[object]]) -> None:
    """Send a build log, with pauses between its pieces."""
    pieces = [b"building\n"] * 6
    fields = [f"Content-Length: {sum(map(len, pieces))}", bearer(push_token(site))]
    await connection.send(request(f"/log/{PRESENT[0]}-program.drv", *fields, method="PUT"))
    for piece in pieces:
        await between()
        await connection.send(piece)
    await connection.receive_answers(["PUT"])


@BY
class TestTheEnd:
    async def test_idle_connections_are_closed_at_once(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, shutdown_timeout=30) as served:
            connections = [await Connection.open(served.port) for _ in range(4)]
            await connections[1].ask(request(HIT))
            await connections[2].ask(request("/"))
            await connections[3].ask(request("/", method="PUT"))
            begun = monotonic()
        assert monotonic() - begun < AT_ONCE
        for connection in connections:
            assert await connection.ends()
            connection.close()

    async def test_an_upload_is_finished(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, shutdown_timeout=30) as served:
            connection = await Connection.open(served.port)
            go_on = asyncio.Event()
            uploading = asyncio.create_task(upload(connection, site, between=go_on.wait))
            await until(lambda: served.fronts.handling == 1)
            begun = monotonic()
            asyncio.get_running_loop().call_later(0.3, go_on.set)
        assert 0.25 < monotonic() - begun < AT_ONCE
        await uploading
        assert b"HTTP/1.1 204 " in connection.received
        assert b"\r\nConnection: close\r\n" in connection.received
        assert await connection.ends()
        connection.close()

    @pytest.mark.parametrize("target", [MEDIUM_NAR, LARGE_NAR])
    @pytest.mark.parametrize("before", [(), ("/",)])
    async def test_answers_are_sent_to_slow_readers(
        self, site: Site, by_reactor: bool, target: str, before: tuple[str, ...]
    ) -> None:
        async with front_server(site, by_reactor=by_reactor, shutdown_timeout=30, send_buffer=SMALL_SOCKET) as served:
            connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
            await connection.ask(*map(request, before))
            await connection.send(request(target))

            async def read() -> None:
                await asyncio.sleep(0.5)
                await connection.receive_answers(["GET"])

            reading = asyncio.create_task(read())
            begun = monotonic()
        assert monotonic() - begun > 0.4
        await reading
        assert bytes(connection.received).endswith(nar(NARS[target.rpartition("/")[2]]))
        connection.close()

    async def test_a_request_that_just_came_is_answered(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor) as served:
            connections = [await Connection.open(served.port) for _ in range(4)]
            targets = [HIT, "/", LARGE_NAR, f"/{UNKNOWN}.narinfo"]
            for connection, target in zip(connections, targets, strict=True):
                await connection._loop.sock_sendall(connection.sock, request(target))
            await asyncio.sleep(0)
        for connection in connections:
            assert await connection.ends()
            assert b"HTTP/1.1 " in connection.received
            connection.close()

    async def test_a_request_that_waits_to_be_let_in_is_answered(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, shutdown_timeout=30) as served:
            waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
            for number, sock in enumerate(waiting):
                sock.sendall(request("/" if number % 9 == 0 else HIT))
        for sock in waiting:
            sock.setblocking(False)
            connection = Connection(sock)
            assert await connection.ends()
            assert connection.received.startswith(b"HTTP/1.1 200 OK\r\n")
            connection.close()

    async def test_nobody_holds_up_the_end(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, shutdown_timeout=0.3) as served:
            stuck = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
            await send_until_refused(stuck, request(LARGE_NAR) * 1000, KERNEL)
            uploading = await Connection.open(served.port)
            fields = ("Content-Length: 100", bearer(push_token(site)))
            await uploading.send(request(f"/log/{PRESENT[0]}-program.drv", *fields, method="PUT"))
            await asyncio.sleep(0.1)
            begun = monotonic()
        assert monotonic() - begun < AT_ONCE
        for connection in (stuck, uploading):
            assert await connection.ends()
            connection.close()

    async def test_a_head_that_never_ends_is_not_waited_for(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, shutdown_timeout=30) as served:
            connection = await Connection.open(served.port)
            await connection.send(request(HIT)[:-2])
            begun = monotonic()
        assert monotonic() - begun < AT_ONCE
        assert await connection.ends()
        connection.close()

    async def test_clients_that_go_away(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor) as served:
            for target in (HIT, "/", LARGE_NAR, f"/nar/{list(NARS)[3]}", f"/{UNKNOWN}.narinfo"):
                for pause in (0, 0.01):
                    connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
                    await connection.send(*[request(target)] * 20)
                    await asyncio.sleep(pause)
                    connection.close()
            await none_left(served)

    async def test_one_who_goes_before_a_nar_begins(self, site: Site, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, send_buffer=SMALL_SOCKET) as served:
            connections = [await Connection.open(served.port, receive_buffer=SMALL_SOCKET) for _ in range(12)]
            part = request(MEDIUM_NAR, f"Range: bytes=0-{SMALL_SOCKET}")
            for number, connection in enumerate(connections):
                # For some of them, just more than the kernel keeps comes before the large one.
                await connection.send(part * number + request(LARGE_NAR))
            await asyncio.sleep(0.3)
            for connection in connections:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            await none_left(served)

    @pytest.mark.parametrize("target", ["/", LARGE_NAR, MEDIUM_NAR, f"/{UNKNOWN}.narinfo"])
    async def test_one_who_goes_before_the_request_is_handled(self, site: Site, by_reactor: bool, target: str) -> None:
        async with front_server(site, by_reactor=by_reactor) as served:
            connection = await Connection.open(served.port)
            await connection.ask(request("/"))
            (front,) = served.fronts._open
            front.data_received(request(target, "X-Unheard-Of: 1"))
            front.abort()
            await none_left(served)
            connection.close()


LAST = ("HTTP/1.0\r\nHost: h", "HTTP/1.0\r\nHost: h\r\nConnection: close", "HTTP/1.1\r\nConnection: close\r\nHost: h")


@BY
@pytest.mark.parametrize("last", LAST, ids=["old", "old-close", "close"])
async def test_the_last_request_of_a_connection_is_answered_by_ourselves(
    site: Site, by_reactor: bool, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As proxies send each of theirs that do not keep their connections."""
    left: list[bytes] = []
    monkeypatch.setattr(Reactor, "_leave", lambda _, __, data: left.append(data))
    monkeypatch.setattr(Front, "_pass_on", lambda _, data: left.append(data))
    async with front_server(site, by_reactor=by_reactor, send_buffer=SMALL_SOCKET) as served:
        for target, end in ((HIT, narinfo(0)), (f"/{ABSENT[0]}.narinfo", b"no such path\n"), (MEDIUM_NAR, nar(MEDIUM))):
            connection = await Connection.open(served.port, receive_buffer=SMALL_SOCKET)
            await connection.send(f"GET {target} {last}\r\n\r\n".encode())
            assert await connection.ends()
            assert connection.received.startswith(last[:8].encode())
            assert connection.received.endswith(end)
            connection.close()
        await none_left(served)
    assert left == []


LIMITS = {
    "a long line": (b"GET /" + b"a" * 8191 + b" HTTP/1.1\r\nHost: h\r\n\r\n", b"400"),
    "a long field": (request("/", "X-A: " + "a" * 8191), b"400"),
    "a long name": (request("/", "a" * 8192 + ": a"), b"400"),
    "many fields": (request("/", *(f"X-{number}: a" for number in range(200))), b"400"),
    "just not too long a line": (b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", b"404"),
    "just not too many fields": (request("/", *(f"X-{number}: a" for number in range(100))), b"200"),
    "an endless line": (b"GET /" + b"a" * 1_000_000, b"400"),
    "an endless head": (request("/")[:-2] + b"X: a\r\n" * 100_000, b"400"),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("segment", [1000, 1_000_000])
async def test_limits(served: Served, name: str, segment: int, caplog: pytest.LogCaptureFixture) -> None:
    data, status = LIMITS[name]
    connection = await Connection.open(served.port)
    await connection.send(*(data[start : start + segment] for start in range(0, len(data), segment)))
    assert await connection.receive(10)
    assert connection.received.startswith(b"HTTP/1.1 " + status) or connection.received.startswith(
        b"HTTP/1.0 " + status
    )
    assert await connection.ends(0.2) == (status == b"400")
    connection.close()
    caplog.clear()


async def test_the_end_of_all_connections_is_waited_for_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one time-out after the other."""
    begun, close, stop = asyncio.Event(), Reactor.close, Fronts.stop

    async def closing(self: Reactor, timeout: float) -> None:
        begun.set()
        await close(self, timeout)

    async def stopping(self: Fronts, timeout: float) -> None:
        async with asyncio.timeout(20):
            await begun.wait()
        await stop(self, timeout)

    monkeypatch.setattr(Reactor, "close", closing)
    monkeypatch.setattr(Fronts, "stop", stopping)
    async with front_server(site, by_reactor=True) as served:
        connection = await Connection.open(served.port)
        await connection.ask(request("/health/live"))
    assert await connection.ends()
    connection.close()


def closing(target: str) -> bytes:
    return request(target, "Connection: close")


def old(target: str) -> bytes:
    return f"GET {target} HTTP/1.0\r\n\r\n".encode()


class TestWhoSendsNoMore:
    @BY
    @pytest.mark.parametrize("form", [request, closing, old])
    async def test_is_answered_and_let_go(self, site: Site, form: Callable[[str], bytes], *, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, send_buffer=SMALL_SOCKET) as served:
            for target in (HIT, f"/main/{UNKNOWN}.narinfo", "/health/live", MEDIUM_NAR, LARGE_NAR):
                whole, connection = await Connection.open(served.port), await Connection.open(served.port)
                await whole.ask(form(target))
                await connection.send(form(target))
                connection.sock.shutdown(socket.SHUT_WR)
                assert await connection.ends()
                answers = [parse(bytes(one.received)) for one in (whole, connection)]
                assert answers[0] == answers[1] != ()
                whole.close()
                connection.close()

    @BY
    async def test_gets_no_answer_to_what_did_not_come(self, site: Site, *, by_reactor: bool) -> None:
        parts = [b"", b"GET / HT", request("/")[:-1], request("/", "Content-Length: 5"), request("/nowhere") * 2]
        async with front_server(site, by_reactor=by_reactor) as served:
            for data in parts:
                connection = await Connection.open(served.port)
                connection.sock.send(data)
                connection.sock.shutdown(socket.SHUT_WR)
                assert await connection.ends()
                assert not connection.received.startswith(b"HTTP/1.1 200")
                connection.close()

    @BY
    async def test_and_takes_no_more(self, site: Site, *, by_reactor: bool) -> None:
        async with front_server(site, by_reactor=by_reactor, send_buffer=SMALL_SOCKET) as served:
            for target in (LARGE_NAR, "/health/live"):
                connection = await Connection.open(served.port, receive_buffer=4096)
                await connection.send(old(target))
                connection.sock.shutdown(socket.SHUT_WR)
                await connection.receive(5)
                connection.close()
            await none_left(served)


class TestTls:
    @pytest.fixture
    def contexts(self, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        return certificate.contexts(tmp_path)

    @pytest.fixture
    async def served(self, site: Site, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[Served]:
        async with front_server(site, tls=contexts[0], send_buffer=SMALL_SOCKET) as served:
            yield served

    async def connect(
        self, served: Served, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_SOCKET)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
        return await asyncio.open_connection(sock=sock, ssl=contexts[1], server_hostname="localhost", limit=1000)

    async def test_slow_readers_and_fast_answers(
        self, served: Served, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
    ) -> None:
        reader, writer = await self.connect(served, contexts)
        for _ in range(3):
            writer.write(request(LARGE_NAR))
            writer.write(request(HIT))
            await asyncio.sleep(0.2)
            assert served.unsent < 2**18
            for content in (nar(LARGE), narinfo(0)):
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"Content-Length: %d\r\n" % len(content) in head
                assert await reader.readexactly(len(content)) == content
        await self.leave(writer)

    @pytest.mark.parametrize("left", range(40_000, 520_000, 60_000))
    async def test_one_who_stops_reading_at_the_end_of_a_nar_gets_no_more_answers_made(
        self, served: Served, contexts: tuple[ssl.SSLContext, ssl.SSLContext], left: int
    ) -> None:
        reader, writer = await self.connect(served, contexts)
        writer.write(request(LARGE_NAR))
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(LARGE - left)
        for _ in range(500):
            writer.write(request(HIT))
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        assert served.unsent < 2**17
        assert await reader.readexactly(left) == nar(LARGE)[-left:]
        for _ in range(500):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(narinfo(0))) == narinfo(0)
        await self.leave(writer)

    async def test_one_who_leaves_in_the_middle_of_a_nar_is_no_defect(
        self, served: Served, contexts: tuple[ssl.SSLContext, ssl.SSLContext], capsys: pytest.CaptureFixture[str]
    ) -> None:
        reader, writer = await self.connect(served, contexts)
        writer.write(request(LARGE_NAR))
        await reader.readexactly(10_000)
        await self.leave(writer)
        await none_left(served)
        assert "defect" not in "".join(capsys.readouterr())

    async def leave(self, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()
