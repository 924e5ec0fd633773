"""Daemons that answer slowly, wrongly, not at all or too late: `cachesrv push` as a process ends, and says why."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar_writer import dump
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.wire import encode_u64
from cachesrv.nix.worker_protocol import Op
from tests.fake_daemon import LAST, FakeDaemon, encode_error, encode_path_info
from tests.system.push import PATIENCE
from tests.system.server import CACHESRV, Server, inherited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fake_daemon import Answer, Peer

NAMES = ("library", "program")
SILENCE = "1"
"""Seconds after which the daemon is given up."""


@dataclass
class Told:
    """How a push ended: its status, its events, and what it said on stderr."""

    status: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        return self.events[-1]

    def errors(self) -> dict[str, str]:
        return {event["path"].partition("-")[2]: event["error"] for event in self.events if event["event"] == "failed"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all: each test has store paths of its own."""
    server = Server(tmp_path_factory.mktemp("server")).start()
    yield server
    server.dispose()


@pytest.fixture
def nar(tmp_path: Path) -> bytes:
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    return b"".join(dump(tmp_path / "file"))


@pytest.fixture
def daemon(nar: bytes) -> FakeDaemon:
    """One with two paths, which are in no store that could be read without it."""
    nar_hash = Hash.of("sha256", nar)
    library, program = (StorePath(nar_hash.bare_nix32[start:][:32], name) for start, name in enumerate(NAMES))
    infos = [PathInfo(library, nar_hash, len(nar)), PathInfo(program, nar_hash, len(nar), (library,))]
    daemon = FakeDaemon(infos=infos)
    daemon.nars = {library.base_name: nar, program.base_name: nar}
    return daemon


async def push(daemon: FakeDaemon, server: Server) -> Told:
    store = f"unix://{daemon.socket}?timeout={SILENCE}"
    options = ["--to", server.main, "--token-file", str(server.token_file), "--store", store, "--json"]
    process = await asyncio.create_subprocess_exec(
        *CACHESRV,
        "push",
        *options,
        *daemon.infos,
        env=inherited() | {"HOME": str(server.folder), "CACHESRV_DEBUG": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return Told(process.returncode, [json.loads(line) for line in out.splitlines()], err.decode())


def published(daemon: FakeDaemon, server: Server) -> list[str]:
    """Names of the daemon's paths that are in the cache."""
    paths = [info.store_path for info in daemon.infos.values()]
    return [path.name for path in paths if server.client().get(f"/main/{path.hash_part}.narinfo").status == 200]


@pytest.mark.parametrize("version", [(1, 32), (1, 99)], ids=str)
async def test_versions_that_can_be_understood(daemon: FakeDaemon, server: Server, version: tuple[int, int]) -> None:
    daemon.version = version
    async with daemon:
        told = await push(daemon, server)

    assert (told.status, told.summary["uploaded"]) == (0, 2), told.stderr
    assert published(daemon, server) == list(NAMES)


@pytest.mark.parametrize("version", [(1, 31), (2, 0)], ids=str)
async def test_versions_that_cannot(daemon: FakeDaemon, server: Server, version: tuple[int, int]) -> None:
    daemon.version = version
    async with daemon:
        told = await push(daemon, server)

    assert told.status == 1
    assert f"the Nix daemon at {daemon.socket}" in told.stderr
    assert f"protocol {version[0]}.{version[1]}" in told.stderr
    assert told.stderr.count("\n") == 1


async def test_a_daemon_that_is_slow_but_answers(daemon: FakeDaemon, server: Server) -> None:
    async def slowly(peer: Peer) -> None:
        answer = LAST + encode_path_info(daemon.infos[await peer.string()])
        for byte in answer:
            await peer.write(bytes([byte]))
            await asyncio.sleep(0)

    daemon.answers[Op.QUERY_PATH_INFO] = slowly
    async with daemon:
        told = await push(daemon, server)

    assert (told.status, told.summary["uploaded"]) == (0, 2), told.stderr


def silent() -> Answer:
    async def answer(peer: Peer) -> None:
        await peer.hung_up()

    return answer


def saying(*data: bytes) -> Answer:
    """These bytes instead of an answer, and then nothing."""

    async def answer(peer: Peer) -> None:
        await peer.string()
        await peer.write(*data)
        await peer.hung_up()

    return answer


def dying(*data: bytes) -> Answer:
    """These bytes instead of an answer, and then the end."""

    async def answer(peer: Peer) -> None:
        await peer.string()
        await peer.write(*data)
        raise ConnectionAbortedError

    return answer


def damaged(nar: bytes) -> bytes:
    """With one bit changed, in the middle of its file."""
    return nar[:150_000] + bytes([nar[150_000] ^ 1]) + nar[150_001:]


OUT_OF_MEMORY = "out of memory"
QUESTIONS = {
    "silence": (silent(), "no answer within 1 seconds (asked for path infos)"),
    "no protocol": (saying(encode_u64(0xBAD)), "does not keep to the protocol: a frame of unknown kind 0xbad"),
    "death": (dying(), "it hung up (asked for path infos)"),
    "out of memory": (dying(encode_error(OUT_OF_MEMORY)), OUT_OF_MEMORY),
}


@pytest.mark.parametrize(("answer", "said"), QUESTIONS.values(), ids=QUESTIONS)
async def test_a_daemon_that_fails_over_a_question(
    daemon: FakeDaemon, server: Server, answer: Answer, said: str
) -> None:
    daemon.answers[Op.QUERY_PATH_INFO] = answer
    async with daemon:
        told = await push(daemon, server)

    assert told.status == 1
    assert f"the Nix daemon at {daemon.socket}" in told.stderr
    assert said in told.stderr
    assert told.stderr.count("\n") == 1
    assert told.summary["uploaded"] == 0


async def test_a_daemon_that_does_not_even_greet(daemon: FakeDaemon, server: Server) -> None:
    daemon.greeting = silent()
    async with daemon:
        told = await push(daemon, server)

    assert told.status == 1
    assert "no answer within 1 seconds (during the handshake)" in told.stderr


NARS: dict[str, tuple[Callable[[bytes], Answer], str]] = {
    "silence": (lambda nar: saying(LAST, nar[:200_000]), "no answer within 1 seconds after 200000 of"),
    "an error": (
        lambda nar: dying(LAST, nar[:200_000], encode_error("cannot read 'file'")),
        "cannot read 'file' (while sending a NAR)",
    ),
    "out of memory": (lambda nar: dying(LAST, nar[:100_000], encode_error(OUT_OF_MEMORY)), OUT_OF_MEMORY),
    "another NAR": (
        lambda nar: saying(LAST, nar[:150_000] + bytes([nar[150_000] ^ 1]) + nar[150_001:]),
        "its NAR has hash",
    ),
    "no NAR": (lambda nar: saying(LAST, bytes(len(nar))), "are not a whole NAR"),
}


@pytest.mark.parametrize(("make", "said"), NARS.values(), ids=NARS)
async def test_a_daemon_that_fails_over_a_nar(
    daemon: FakeDaemon, server: Server, nar: bytes, make: Callable[[bytes], Answer], said: str
) -> None:
    """The path fails, with what needs it; nothing of it is kept."""
    daemon.answers[Op.NAR_FROM_PATH] = make(nar)
    async with daemon:
        told = await push(daemon, server)

    assert told.status == 3
    assert said in told.errors()["library"]
    assert told.errors().keys() == {"library", "program"}
    assert (told.summary["uploaded"], told.summary["failed"]) == (0, 2)
    assert published(daemon, server) == []
    nar_hash = Hash.of("sha256", nar).bare_nix32
    assert list((server.objects / "nar").glob(f"{nar_hash}*")) == []


async def test_a_push_after_the_daemon_has_recovered(daemon: FakeDaemon, server: Server) -> None:
    daemon.answers[Op.NAR_FROM_PATH] = dying(LAST)
    async with daemon:
        assert (await push(daemon, server)).status == 3
        daemon.answers[Op.NAR_FROM_PATH] = daemon.nar
        told = await push(daemon, server)

    assert (told.status, told.summary["uploaded"]) == (0, 2)
