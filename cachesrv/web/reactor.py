"""The hottest path: lookups and small NARs answered in a loop of our own, without asyncio's machinery around each one.

    listening socket ── Reactor ──┬── lookups in a form met before, and what `cachesrv.web.fast` can answer
                                  └── everything else: the connection goes over to asyncio, as a `Front`, for good

An epoll object holds the listening sockets, and the connections on which nothing but such requests has come so far. It
is itself watched by the event loop, which calls in when there is something to do, so that both share one thread. All
that is ready is worked off in one go: with one snapshot of the index, and one addition to each counter.

A client's requests are the same but for the hash part. When one of them has been understood in full, what stands
before and after the hash part is remembered on the connection (`Form`); the next request that has the same there is
answered by one look into the index.

A connection that wants anything else, or has sent only a part of a request, leaves. What was read goes with it, and
nothing else was read, so that nothing is lost and the order is kept. An answer that the client does not take at once is
sent on as it does, and meanwhile nothing is read from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.web.accepting import AT_ONCE, PAUSE, no_room, waiting
from cachesrv.web.known import Known
from cachesrv.web.listen import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cachesrv.web.fast import FastAnswers, FileAnswer, Form

_READ = 448
"""Bytes read first: for them CPython needs no malloc, and most requests are shorter."""
_MAX_READ = 4096
"""Bytes read at a time; a request that fills them is none of ours."""
_READ_BY_ASYNCIO = 256 * 1024
_EVENTS = 64
_REQUESTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
"""What is watched for on a connection. Each arrival is told once, which costs the kernel less: all that has come has to
be read, or the connection watched anew.
"""
_SHARE = 0.002
"""Seconds for which lookups are answered without a look at what else is to be done."""
_SWEEPS = 5
"""How often in the idle time-out it is looked who is idle."""
_STOP_INTERVAL = 0.02
_NO_VERSION = -1
"""Of an index that cannot be read."""
_TCP_INFO = struct.Struct("=52xII")
"""In `struct tcp_info`: milliseconds since data came, and since an acknowledgement did. Source: linux/tcp.h."""


class _Connection:
    """A client. `unsent` is what it has not taken yet; after that come bytes of `file`, from `position` to `end`.
    `slow`: it is counted as one that does not take its answers. `last`: it is closed when it has.
    """

    __slots__ = ("end", "file", "form", "last", "position", "recv", "send", "slow", "sock", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recv = sock.recv
        self.send = sock.send
        self.form: Form | None = None
        self.unsent: memoryview | None = None
        self.slow = self.last = False
        self.file = -1
        self.position = 0
        self.end = 0

    @property
    def sending(self) -> bool:
        return self.unsent is not None or self.file >= 0


class Reactor:
    """`make_front` gives the protocol of a connection that leaves, from what was read of it. A connection is closed
    when nothing was asked or taken for `idle_timeout` seconds; while it is being sent an answer, the kernel sees to it
    that it does not stall for ever (see `cachesrv.web.listen`).
    """

    def __init__(
        self, answers: FastAnswers, make_front: Callable[[bytes], asyncio.Protocol], *, idle_timeout: float
    ) -> None:
        self._answers = answers
        self._make_front = make_front
        self._idle_timeout = idle_timeout
        self._epoll = select.epoll()
        self._listening: dict[int, socket.socket] = {}
        self._connections: dict[int, _Connection] = {}
        self._known = Known()
        self._leaving: set[asyncio.Task[object]] = set()
        self._accepting = False
        self._stopping = False

    def __len__(self) -> int:
        return len(self._connections)

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Answer on these listening TCP sockets."""
        for sock in sockets:
            sock.setblocking(False)
            self._listening[sock.fileno()] = sock
        self._listen()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._epoll.fileno(), self._work)
        self._sweeping = loop.create_task(self._sweep())

    async def stop_answering(self) -> None:
        """Accept no more connections, answer what has been asked, close what is idle; return when those that leave have
        left.
        """
        if self._stopping:
            return
        if self._accepting:
            for sock in self._listening.values():
                self._accept(sock, BACKLOG)
        self._listen_no_more()
        for sock in self._listening.values():
            sock.close()
        # As often as it takes for each connection to have its turn: who goes on asking does not hold up the end.
        for _ in range(0, len(self._connections), _EVENTS):
            self._attend_all(self._epoll.poll(0, _EVENTS))
        self._stopping = True
        for connection in self._idle():
            self._end(connection)
        while self._leaving:
            await asyncio.wait(self._leaving)

    async def close(self, timeout: float) -> None:
        """Close the connections on which an answer is being sent when it is sent, or after `timeout` seconds."""
        if self._epoll.closed:
            return
        deadline = asyncio.get_running_loop().time() + timeout
        while self._connections and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  once in a lifetime
            await asyncio.sleep(_STOP_INTERVAL)
        self._sweeping.cancel()
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        for connection in list(self._connections.values()):
            self._end(connection)
        self._epoll.close()

    def _idle(self) -> list[_Connection]:
        return [connection for connection in self._connections.values() if not connection.sending]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._idle_timeout / _SWEEPS)
            for connection in self._idle():
                info = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
                if min(_TCP_INFO.unpack(info)) > self._idle_timeout * 1000:
                    self._end(connection)

    def _work(self) -> None:
        """Answer until nothing more is ready, or others have waited long enough."""
        end = time.monotonic() + _SHARE
        while events := self._epoll.poll(0, _EVENTS):
            self._attend_all(events)
            if time.monotonic() > end:
                return

    def _attend_all(self, events: list[tuple[int, int]]) -> None:
        """All is read first, and all is sent then: clients wake up once for several answers."""
        answers: list[tuple[_Connection, bytes]] = []
        try:
            self._read(events, answers)
        except BaseException:
            for descriptor, _ in events:
                if connection := self._connections.get(descriptor):
                    self._watch(connection)
            raise
        finally:
            for connection, answer in answers:
                # As `_send`: a call less is some percent more requests.
                try:
                    sent = connection.send(answer)
                except OSError as error:
                    sent = self._failed(connection, error)
                if sent < len(answer) and connection.sock.fileno() >= 0:
                    self._send_later(connection, memoryview(answer)[sent:])

    def _read(self, events: list[tuple[int, int]], into: list[tuple[_Connection, bytes]]) -> None:
        """Put the answers to lookups `into` a list, and do whatever else is to be done."""
        answers = self._answers
        if answers.refresh():
            self._known.forget()
            for connection in self._connections.values():
                connection.form = None
        # What follows runs for each request: names are local, and calls into Python are few.
        connections, readable, append = self._connections, select.EPOLLIN, into.append
        ok, miss = answers.ok, answers.miss
        hits = misses = 0
        try:
            get, done, version = answers.snapshot()
        except Exception:  # noqa: BLE001  whatever it was, the handlers meet it too, and have words for it
            get, done, version = _unreadable, _nothing, _NO_VERSION
        known = self._known.at(version, answers.now)
        try:
            for descriptor, event in events:
                asking = connections.get(descriptor)
                if asking is None or event != readable:
                    self._attend(descriptor, asking, event)
                    continue
                connection = asking
                try:
                    data = connection.recv(_READ)
                except OSError as error:
                    self._failed(connection, error)
                    continue
                value = known.get(data)
                if value is None:
                    value = self._find(connection, data, get)
                if value:
                    hits += 1
                    append((connection, ok + value))
                elif value is not None:
                    misses += 1
                    append((connection, miss))
        finally:
            done()
            answers.count(hits, misses)

    def _find(self, connection: _Connection, data: bytes, get: Callable[[bytes], bytes | None]) -> bytes | None:
        """What is `Known` of a request from now on, by the `get` of a snapshot; None when all that can be done for it
        is done.
        """
        if len(data) == _READ:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                data += connection.recv(_MAX_READ - _READ)
        form = connection.form
        if not (form and data.startswith(form.before) and data.endswith(form.after) and len(data) == form.length):
            self._understand(connection, data)
            return None
        hash_part = data[form.start : form.end]
        answer = self._answers.find(get, form.cache, form.prefix + hash_part, hash_part)
        if answer is None:
            self._leave(connection, data)
            return None
        value, until = answer
        if len(data) != _READ:
            self._known.remember(data, value, until)
        return value

    def _understand(self, connection: _Connection, data: bytes) -> None:
        """Answer what has no known form."""
        if not data:
            self._end(connection)
        elif len(data) >= _MAX_READ:
            self._leave(connection, data)
        elif answer := self._answers.file(data):
            self._send_answer(connection, answer)
        elif (content := self._answers.answer(data)) is not None:
            connection.form = self._answers.form(data)
            self._send(connection, content)
        elif (content := self._answers.last(data)) is not None:
            self._send(connection, content)
            connection.last = True
            if not connection.sending:
                self._end(connection)
        else:
            self._leave(connection, data)

    def _send(self, connection: _Connection, data: bytes) -> None:
        try:
            sent = connection.send(data)
        except OSError as error:
            sent = self._failed(connection, error)
        if sent < len(data) and connection.sock.fileno() >= 0:
            self._send_later(connection, memoryview(data)[sent:])

    def _send_answer(self, connection: _Connection, answer: FileAnswer) -> None:
        """A head and a file: at once, if the client takes it, else with a descriptor of the connection's own."""
        head, size = answer.head, answer.size
        unsent, sent = len(head), 0
        try:
            unsent -= connection.send(head, socket.MSG_MORE)
            if not unsent:
                sent = os.sendfile(connection.sock.fileno(), answer.descriptor, 0, size)
        except OSError as error:
            self._failed(connection, error)
        if sent < size and connection.sock.fileno() >= 0:
            try:
                connection.file = os.dup(answer.descriptor)
            except OSError:
                self._end(connection)
                return
            connection.position, connection.end = sent, size
            self._send_later(connection, memoryview(head)[-unsent:] if unsent else None)

    def _send_file(self, connection: _Connection) -> bool:
        """Whether all of the file is sent, or will never be."""
        try:
            while connection.position < connection.end:
                rest = connection.end - connection.position
                sent = os.sendfile(connection.sock.fileno(), connection.file, connection.position, rest)
                if sent == 0:
                    raise OSError("the file of a NAR became shorter")  # noqa: TRY301  as bad as a broken connection
                connection.position += sent
        except BlockingIOError:
            return False
        except OSError:
            self._end(connection)
            return True
        os.close(connection.file)
        connection.file = -1
        return True

    def _send_later(self, connection: _Connection, unsent: memoryview | None) -> None:
        connection.unsent = unsent
        if unsent is not None:
            connection.slow = True
            self._answers.slow += 1
        self._epoll.modify(connection.sock.fileno(), select.EPOLLOUT)

    def _send_on(self, connection: _Connection) -> None:
        """The client takes more."""
        if connection.unsent is not None:
            try:
                sent = connection.send(connection.unsent)
            except OSError as error:
                self._failed(connection, error)
                return
            connection.unsent = connection.unsent[sent:]
            if connection.unsent:
                return
            self._has_taken(connection)
        if connection.file >= 0 and not self._send_file(connection):
            return
        if self._stopping or connection.last:
            self._end(connection)
        elif connection.sock.fileno() >= 0:
            self._watch(connection)

    def _has_taken(self, connection: _Connection) -> None:
        """Nothing waits for it in our memory any more."""
        connection.unsent = None
        if connection.slow:
            connection.slow = False
            self._answers.slow -= 1

    def _attend(self, descriptor: int, connection: _Connection | None, event: int) -> None:
        """Whatever is not simply a request."""
        if descriptor in self._listening:
            self._accept(self._listening[descriptor])
        elif connection is None:
            return  # it was ended by what came before in the same go
        elif event & select.EPOLLOUT:
            self._send_on(connection)
        elif event & select.EPOLLIN:
            try:
                self._understand(connection, connection.recv(_MAX_READ))
            except OSError as error:
                self._failed(connection, error)
            if descriptor in self._connections:
                # The end of what the client sends has come, and is told no second time.
                self._watch(connection)
        else:
            self._end(connection)

    def _accept(self, listening: socket.socket, most: int = AT_ONCE) -> None:
        try:
            for sock in waiting(listening, most):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._epoll.register(sock.fileno(), _REQUESTS)
                self._connections[sock.fileno()] = _Connection(sock)
        except OSError as error:
            no_room(error)
            self._listen_no_more()
            asyncio.get_running_loop().call_later(PAUSE, self._listen)

    def _watch(self, connection: _Connection) -> None:
        """Tell again what there is."""
        if not connection.sending:
            self._epoll.modify(connection.sock.fileno(), _REQUESTS)

    def _listen(self) -> None:
        if not (self._stopping or self._accepting):
            self._accepting = True
            for descriptor in self._listening:
                self._epoll.register(descriptor, select.EPOLLIN)

    def _listen_no_more(self) -> None:
        if self._accepting:
            self._accepting = False
            for descriptor in self._listening:
                self._epoll.unregister(descriptor)

    def _leave(self, connection: _Connection, data: bytes) -> None:
        """Let asyncio have it, with what one read of its own would have given it."""
        if len(data) == _MAX_READ:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                data += connection.recv(_READ_BY_ASYNCIO - _MAX_READ)
        self._forget(connection)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(lambda: self._make_front(data), connection.sock))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _failed(self, connection: _Connection, error: OSError) -> int:
        """Nothing could be read or sent: because there is nothing to read or no room, or because it is over."""
        if not isinstance(error, (BlockingIOError, InterruptedError)):
            self._end(connection)
        return 0

    def _end(self, connection: _Connection) -> None:
        self._forget(connection)
        self._has_taken(connection)
        if connection.file >= 0:
            os.close(connection.file)
            connection.file = -1
        connection.sock.close()

    def _forget(self, connection: _Connection) -> None:
        descriptor = connection.sock.fileno()
        if self._connections.pop(descriptor, None):
            self._epoll.unregister(descriptor)


def _unreadable(_key: bytes) -> bytes | None:
    raise StoreError("the index cannot be read")


def _nothing() -> None:
    """What there is to be done with a snapshot that there is not."""
