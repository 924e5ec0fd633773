"""Which connections the reactor keeps, which leave it, and what becomes of slow, idle and open ones."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import lmdb
import pytest
from aiohttp import web

from cachesrv.catalog.base import PathRecord
from cachesrv.index.base import IndexEntry
from cachesrv.services.answer import present
from cachesrv.web.app import create_app
from cachesrv.web.fast import FastAnswers
from cachesrv.web.front import Fronts, reporting
from cachesrv.web.reactor import Reactor
from cachesrv.web.server import RUNNER_OPTIONS
from tests.exchange import Connection
from tests.front_site import (
    ABSENT,
    CACHES,
    ENDED,
    LARGE,
    MEDIUM,
    NARS,
    PRESENT,
    SMALL,
    UNKNOWN,
    counting_apart,
    hash_part,
    listening,
    nar,
    narinfo,
    no_more_files,
    open_site,
)
from tests.waiting import PLENTY, Pace, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cachesrv.web.site import Site

FURTHER = [hash_part(number) for number in range(301, 330)]
NAMES = {size: name for name, size in NARS.items()}


@dataclass(frozen=True)
class Served:
    ports: Sequence[int]
    answers: FastAnswers
    reactor: Reactor
    fronts: Fronts
    site: Site
    clients: ExitStack

    @property
    def port(self) -> int:
        return self.ports[0]

    async def connect(self, receive_buffer: int | None = None) -> Connection:
        connection = await Connection.open(self.port, receive_buffer=receive_buffer)
        self.clients.callback(connection.close)
        return connection

    async def until(self, *, reactor: int, fronts: int) -> None:
        """Wait until so many connections are here and there."""
        await until(lambda: (len(self.reactor), len(self.fronts)) == (reactor, fronts))


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    idle_timeout: float = 60,
    send_buffer: int | None = None,
    complete: bool = False,
    sockets: int = 1,
) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        site = counting_apart(await stack.enter_async_context(open_site(folder, complete=complete)))
        runner = web.AppRunner(create_app(site, [reporting]), **RUNNER_OPTIONS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        assert runner.server is not None
        answers = FastAnswers(site)
        stack.callback(answers.close)
        fronts = Fronts(answers, runner.server)
        reactor = Reactor(answers, fronts, idle_timeout=idle_timeout)
        opened = [listening(send_buffer) for _ in range(sockets)]
        ports = [sock.getsockname()[1] for sock in opened]
        reactor.start(opened)
        try:
            with ExitStack() as clients:
                yield Served(ports, answers, reactor, fronts, site, clients)
        finally:
            await reactor.stop_answering()
            await fronts.stop(1)
            await reactor.close(1)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


def get(target: str, *fields: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: cache.test", *fields, "", ""]).encode()


def record(part: str, number: int) -> PathRecord:
    return PathRecord(
        cache="main",
        hash_part=part,
        name="published",
        narinfo=narinfo(number),
        nar_key="main/nar/published.nar",
        nar_hash="sha256:" + "0" * 52,
        nar_size=1,
        file_size=1,
        references=(),
        deriver=None,
        ca=None,
        registered_at=1,
    )


async def answers_to(connection: Connection, *requests: bytes) -> list[tuple[bytes, bytes]]:
    """Status lines and bodies, each asked for when the one before has come."""
    answers = []
    for request in requests:
        before = len(connection.received)
        await connection.send(request)
        await connection.receive_answers(["GET"])
        head, _, body = bytes(connection.received[before:]).partition(b"\r\n\r\n")
        answers.append((head.split(b"\r\n")[0], body))
    return answers


OK, MISS = b"HTTP/1.1 200 OK", b"HTTP/1.1 404 Not Found"


async def test_lookups_stay_and_are_answered_by_their_form(served: Served) -> None:
    connection = await served.connect()
    targets = [f"/{PRESENT[0]}", f"/main/{PRESENT[1]}", f"/main/{PRESENT[2]}", f"/{PRESENT[3]}", f"/open/{PRESENT[0]}"]
    answers = await answers_to(connection, *(get(f"{target}.narinfo") for target in targets))
    assert answers == [(OK, narinfo(number)) for number in (0, 1, 2, 3, 0)]
    absent = await answers_to(connection, *(get(f"/main/{part}.narinfo") for part in ABSENT))
    assert absent == [(MISS, b"no such path\n")] * len(ABSENT)
    assert (len(served.reactor), len(served.fronts)) == (1, 0)
    text = served.site.services.metrics.render().decode()
    assert 'method="GET",route="narinfo",status="200"} 5.0' in text
    assert f'method="GET",route="narinfo",status="404"}} {float(len(ABSENT))}' in text


async def test_long_requests_stay_too(served: Served) -> None:
    connection = await served.connect()
    for length in (*range(300, 460, 7), 447, 448, 449, 2000, 3500):
        request = get(f"/main/{PRESENT[0]}.narinfo", "User-Agent: ")
        request = request.replace(b"User-Agent: ", b"User-Agent: " + b"x" * (length - len(request)))
        assert len(request) == length
        assert await answers_to(connection, request, request) == [(OK, narinfo(0))] * 2
    assert (len(served.reactor), len(served.fronts)) == (1, 0)


async def test_what_is_known_is_never_out_of_step_with_the_index(served: Served) -> None:
    connection = await served.connect()
    index = served.site.services.index
    absent, found = get(f"/main/{ABSENT[0]}.narinfo"), get(f"/main/{PRESENT[0]}.narinfo")
    for number in range(5, 8):
        assert await answers_to(connection, absent, absent) == [(MISS, b"no such path\n")] * 2
        index.put([IndexEntry("main", ABSENT[0], present(narinfo(number)))])
        assert await answers_to(connection, absent, absent) == [(OK, narinfo(number))] * 2
        index.put([IndexEntry("main", PRESENT[0], present(narinfo(number)))])
        assert await answers_to(connection, found, found) == [(OK, narinfo(number))] * 2
        index.delete([("main", ABSENT[0])])
        index.put_absent([("main", ABSENT[0])], int(time.time()) + 3600)
    assert (len(served.reactor), len(served.fronts)) == (1, 0)


async def test_an_absence_that_ends_while_it_is_known_is_believed_no_more(served: Served) -> None:
    connection = await served.connect()
    request = get(f"/main/{UNKNOWN}.narinfo")
    assert await answers_to(connection, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
    served.site.services.index.put_absent([("main", UNKNOWN)], int(served.answers.now) + 1)
    assert await answers_to(connection, request, request) == [(MISS, b"no such path\n")] * 2
    assert (len(served.reactor), len(served.fronts)) == (1, 0)
    served.answers.now += 2
    assert await answers_to(connection, request) == [(MISS, b"no such path\n")]
    await served.until(reactor=0, fronts=1)


async def test_what_nobody_has_asked_for_is_looked_up_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, complete=True) as served:
        connection = await served.connect()
        found = get(f"/main/{PRESENT[0]}.narinfo")
        unknown = [get(f"/{cache}{part}.narinfo") for part in (UNKNOWN, ENDED, *FURTHER) for cache in ("", "main/")]
        answers = await answers_to(connection, found, *unknown, *unknown)
        assert answers == [(OK, narinfo(0)), *[(MISS, b"no such path\n")] * 2 * len(unknown)]
        assert (len(served.reactor), len(served.fronts)) == (1, 0)
        assert served.site.services.index.get("main", UNKNOWN) is None

        index, catalog = served.site.services.index, served.site.services.catalog
        await catalog.publish([record(UNKNOWN, 5)])
        index.put([IndexEntry("main", UNKNOWN, present(narinfo(5)))])
        assert await answers_to(connection, unknown[0]) == [(OK, narinfo(5))]
        assert (len(served.reactor), len(served.fronts)) == (1, 0)


async def test_what_only_the_catalog_has_is_found_there(tmp_path: Path) -> None:
    async with serving(tmp_path, complete=True) as served:
        connection = await served.connect()
        found, unknown = get(f"/main/{PRESENT[0]}.narinfo"), get(f"/main/{UNKNOWN}.narinfo")
        await served.site.services.catalog.publish([record(UNKNOWN, 5)])
        assert await answers_to(connection, found, unknown, unknown) == [(OK, narinfo(n)) for n in (0, 5, 5)]


@pytest.mark.parametrize("end", [b"e", b"~", b"U"])
async def test_what_is_no_hash_part_is_not_looked_up_at_once(tmp_path: Path, end: bytes) -> None:
    async with serving(tmp_path, complete=True) as served:
        connection = await served.connect()
        found = get(f"/main/{PRESENT[0]}.narinfo")
        assert await answers_to(connection, found) == [(OK, narinfo(0))]
        await connection.send(found.replace(PRESENT[0].encode(), b"0" * 31 + end))
        await served.until(reactor=0, fronts=1)


async def test_use_is_noted(served: Served) -> None:
    connection = await served.connect()
    await answers_to(connection, *[get(f"/main/{part}.narinfo") for part in PRESENT])
    assert {f"main/{part}".encode() for part in PRESENT} <= set(served.site.services.usage._gathered)


@pytest.mark.parametrize("size", [1, MEDIUM, LARGE])
async def test_nars_in_memory_are_sent_from_their_files(served: Served, size: int) -> None:
    connection = await served.connect()
    request = get(f"/main/nar/{NAMES[size]}")
    assert await answers_to(connection, request, request, request) == [(OK, nar(size))] * 3
    assert (len(served.reactor), len(served.fronts)) == (1, 0)


@pytest.mark.parametrize(
    "request_",
    [
        get("/nix-cache-info"),
        get(f"/main/{UNKNOWN}.narinfo"),
        get(f"/main/{ENDED}.narinfo"),
        get(f"/main/nar/{NAMES[MEDIUM]}", "Range: bytes=0-9"),
        get(f"/main/{PRESENT[0]}.narinfo", 'If-None-Match: "x"'),
        get(f"/main/{PRESENT[0]}.narinfo", "X-Unheard-Of: yes"),
        get(f"/team/{PRESENT[0]}.narinfo"),
        get(f"/main/{PRESENT[0]}.narinfo")[:-2],
        b"\x16\x03\x01garbage\r\n\r\n",
        get(f"/main/{PRESENT[0]}.narinfo") * 2,
    ],
)
async def test_what_is_not_plain_leaves(served: Served, request_: bytes) -> None:
    connection = await served.connect()
    assert await answers_to(connection, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
    await connection.send(request_)
    await until(lambda: not len(served.reactor))


async def test_a_connection_that_left_is_answered_all_the_same(served: Served) -> None:
    connection = await served.connect()
    first, second, third = await answers_to(
        connection, get(f"/main/{UNKNOWN}.narinfo"), get(f"/main/{UNKNOWN}.narinfo"), get(f"/main/{PRESENT[0]}.narinfo")
    )
    assert first == second == (MISS, b"no such path\n")
    assert third == (OK, narinfo(0))
    await served.until(reactor=0, fronts=1)


async def test_new_rules_hold_for_connections_with_a_form(served: Served) -> None:
    connection = await served.connect()
    request = get(f"/open/{PRESENT[0]}.narinfo")
    assert await answers_to(connection, request, request) == [(OK, narinfo(0))] * 2
    rules = served.site.rules
    caches = {name: cache for name, cache in rules.caches.items() if name in CACHES and name != "open"}
    served.site.rules = replace(rules, caches=caches)
    ((status, _),) = await answers_to(connection, request)
    assert status == MISS


@pytest.mark.parametrize("size", [MEDIUM, LARGE])
async def test_a_slow_reader_gets_all_of_a_nar(tmp_path: Path, size: int) -> None:
    async with serving(tmp_path, send_buffer=8192) as served:
        connection = await served.connect(receive_buffer=4096)
        other = await served.connect()
        await connection.send(get(f"/main/nar/{NAMES[size]}"))
        await asyncio.sleep(0.1)
        # Meanwhile others are answered.
        assert await answers_to(other, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
        await connection.receive_answers(["GET"])
        assert bytes(connection.received).endswith(nar(size))
        assert await answers_to(connection, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
        assert (len(served.reactor), len(served.fronts)) == (2, 0)


async def test_nothing_more_is_read_from_who_does_not_take_answers(tmp_path: Path) -> None:
    async with serving(tmp_path, send_buffer=8192) as served:
        connection = await served.connect(receive_buffer=4096)
        request = get(f"/main/{PRESENT[0]}.narinfo")
        sent = await sent_until_held_up(connection, request)
        await asyncio.sleep(0.2)
        again = await sent_until_held_up(connection, request)
        assert sent > 10
        # What fits into the kernel's buffers on both sides has been taken; none of it is held in our memory.
        assert again < sent
        assert len(served.reactor) + len(served.fronts) == 1


async def sent_until_held_up(connection: Connection, request: bytes) -> int:
    """How often a request can be sent to who does not read it: until none is taken in a hundred rounds of its loop."""
    sent = in_vain = 0
    data = b""
    while in_vain < 100:
        data = data or request * 10
        try:
            taken = connection.sock.send(data)
        except BlockingIOError:
            in_vain += 1
            await asyncio.sleep(0.01)
        else:
            sent, in_vain, data = sent + taken, 0, data[taken:]
            await asyncio.sleep(0)
    return sent // len(request)


async def test_idle_connections_are_closed_and_others_are_not(tmp_path: Path) -> None:
    asked = get(f"/main/{PRESENT[0]}.narinfo")
    for number in range(Pace.TRIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with serving(folder, idle_timeout=1) as served:
            idle, silent, busy = await served.connect(), await served.connect(), await served.connect()
            assert await answers_to(idle, asked) == [(OK, narinfo(0))]
            pace = Pace(0.9)
            async with asyncio.timeout(PLENTY):
                while len(served.reactor) > 1:
                    await busy.ask(asked)
                    await asyncio.sleep(0.15)
                    pace.step()
            for connection in (idle, silent):
                assert not await connection.receive(PLENTY)
                assert connection.ended
            if pace.kept:
                assert not busy.ended
                break


async def test_the_end_closes_what_is_idle_and_finishes_what_is_sent(tmp_path: Path) -> None:
    async with serving(tmp_path, send_buffer=8192) as served:
        idle, slow = await served.connect(), await served.connect(receive_buffer=4096)
        assert await answers_to(idle, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
        await slow.send(get(f"/main/nar/{NAMES[LARGE]}"))
        await served.reactor.stop_answering()
        closing = asyncio.create_task(served.reactor.close(20))
        await slow.receive_answers(["GET"])
        assert bytes(slow.received).endswith(nar(LARGE))
        await closing
        assert not await idle.receive(PLENTY)


@pytest.mark.parametrize("size", [SMALL, MEDIUM])
async def test_at_the_end_all_are_answered_who_have_asked(tmp_path: Path, size: int) -> None:
    async with serving(tmp_path) as served:
        connections = [await served.connect() for _ in range(600)]
        await served.until(reactor=600, fronts=0)
        waiting = await served.connect()  # accepted by nobody yet
        for connection in (*connections, waiting):
            connection.sock.send(get(f"/main/nar/{NAMES[size]}"))
        await served.reactor.stop_answering()
        closing = asyncio.create_task(served.reactor.close(20))
        for connection in (*connections, waiting):
            await connection.receive_answers(["GET"])
            assert bytes(connection.received).endswith(nar(size))
            connection.close()
        await closing


async def test_many_connections_at_once(served: Served) -> None:
    connections = [await served.connect() for _ in range(300)]
    for connection in connections:
        await connection.send(get(f"/main/{PRESENT[1]}.narinfo"))
    for connection in connections:
        await connection.receive_answers(["GET"])
        assert bytes(connection.received).endswith(narinfo(1))
    assert len(served.reactor) == len(connections)
    for connection in connections:
        connection.close()
    await served.until(reactor=0, fronts=0)


async def test_who_sends_no_more_after_a_request_is_answered_and_let_go(served: Served) -> None:
    for form in (False, True):
        connection = await served.connect()
        request = get(f"/main/{PRESENT[0]}.narinfo")
        if form:
            await answers_to(connection, request)
        before = len(connection.received)
        await connection.send(request)
        connection.sock.shutdown(socket.SHUT_WR)
        assert await connection.ends()
        assert bytes(connection.received[before:]).endswith(narinfo(0))
    await served.until(reactor=0, fronts=0)


async def test_a_defect_loses_no_request_but_its_own(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = [await served.connect() for _ in range(3)]
    request = get(f"/main/{PRESENT[0]}.narinfo")
    for connection in connections:
        await answers_to(connection, request)
    understood, defects = served.answers.find, iter([ZeroDivisionError])

    def find(*arguments: object) -> object:
        for defect in defects:
            raise defect
        return understood(*arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(served.answers, "find", find)
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context.get("exception")))
    other = get(f"/main/{PRESENT[1]}.narinfo")
    before = [len(connection.received) for connection in connections]
    for connection in connections:
        connection.sock.send(other)
    receiving = [asyncio.create_task(connection.receive(PLENTY)) for connection in connections]
    await until(lambda: sum(task.done() for task in receiving) >= 2)
    for task in receiving:
        task.cancel()
    await asyncio.gather(*receiving, return_exceptions=True)
    answered = [len(connection.received) > start for connection, start in zip(connections, before, strict=True)]
    assert sorted(answered) == [False, True, True]
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_new_rules_hold_in_the_reactor_whoever_met_them_first(served: Served) -> None:
    elsewhere, connection, other = await served.connect(), await served.connect(), await served.connect()
    await answers_to(elsewhere, get("/nix-cache-info"))
    await served.until(reactor=2, fronts=1)
    request, nar_request = get(f"/open/{PRESENT[0]}.narinfo"), get(f"/open/nar/{NAMES[LARGE]}")
    assert await answers_to(connection, request, request) == [(OK, narinfo(0))] * 2
    assert await answers_to(other, nar_request) == [(OK, nar(LARGE))]
    rules = served.site.rules
    private = replace(rules.caches["open"], public=False)
    served.site.rules = replace(rules, caches={**rules.caches, "open": private})
    assert await answers_to(elsewhere, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
    for asking in (connection, other):
        for asked in (request, nar_request, get(f"/open/{PRESENT[1]}.narinfo")):
            ((status, _),) = await answers_to(asking, asked)
            assert status == b"HTTP/1.1 401 Unauthorized"


async def test_an_index_that_cannot_be_looked_into_is_left_to_the_handlers(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await served.connect()
    request = get(f"/main/{PRESENT[0]}.narinfo")
    assert await answers_to(connection, request) == [(OK, narinfo(0))]

    def fail(*_: object) -> None:
        raise lmdb.PanicError("a write failed")

    monkeypatch.setattr(served.answers, "snapshot", fail)
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context.get("exception")))
    ((status, _),) = await answers_to(connection, request)
    assert status == b"HTTP/1.1 200 OK"  # the handlers' own look at the index succeeds here
    assert not told
    await served.until(reactor=0, fronts=1)


async def test_what_does_not_fit_among_the_open_files_waits_and_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path, sockets=2) as served:
        first = await served.connect()
        assert await answers_to(first, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        clients = [socket.create_connection(("127.0.0.1", port)) for port in served.ports]
        with no_more_files():
            for _ in range(5):
                await asyncio.sleep(0)
            assert await answers_to(first, get(f"/main/{PRESENT[1]}.narinfo")) == [(OK, narinfo(1))]
        for client in clients:
            client.setblocking(False)
            connection = Connection(client)
            assert await answers_to(connection, get(f"/main/{PRESENT[0]}.narinfo")) == [(OK, narinfo(0))]
            connection.close()
        assert not told


async def test_the_end_comes_also_while_no_connections_are_accepted(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = socket.create_connection(("127.0.0.1", served.port))
        served.clients.callback(client.close)
        with no_more_files():
            for _ in range(5):
                await asyncio.sleep(0)
            await served.reactor.stop_answering()


async def test_a_nar_that_cannot_be_sent_on_ends_its_connection(tmp_path: Path) -> None:
    async with serving(tmp_path, send_buffer=8192) as served:
        connection = await served.connect(receive_buffer=4096)
        with no_more_files(leave=1):
            await connection.send(get(f"/main/nar/{NAMES[LARGE]}"))
            await connection.receive_answers(["GET"])
        assert connection.ended
        assert len(served.reactor) == 0
