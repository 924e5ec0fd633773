"""The worker protocol, by which clients talk to the Nix daemon; this is the client's side, without any I/O.

Protocol 1.32 (Nix 2.4) to 1.38; Lix speaks 1.35 and refuses less.
[Nix, src/libstore/worker-protocol-connection.cc, worker-protocol.cc, daemon.cc]

An exchange is a generator of `Steps`: it yields bytes that are to be written, or a number of bytes that it needs
next and is then sent exactly those; it returns what the exchange was for. The driver owns the socket and the clock;
when bytes fail to come, it throws the `DaemonError` that says why into the generator, `HungUp` if there will be no
more. Three things go wrong, and differ in what they mean for the connection:

- `OperationFailed`: the daemon said why it did not do one operation; the connection is still in step;
- `DaemonError` otherwise: this daemon cannot be talked to;
- `BadInput`: what came is not this protocol; nothing more can be read from this connection.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeAlias, TypeVar

from cachesrv.errors import BadInput, DaemonError
from cachesrv.nix.daemon_messages import HungUp, OperationFailed, clean, read_until_last
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.realisation import Realisation, TracedOutput
from cachesrv.nix.signing import readable_signatures
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.wire import (
    Reading,
    encode_string,
    encode_strings,
    encode_u64,
    read_bool,
    read_bytes,
    read_string,
    read_strings,
    read_u64,
)

T = TypeVar("T")
Steps: TypeAlias = Generator[int | bytes, bytes, T]
Version: TypeAlias = tuple[int, int]

CLIENT_MAGIC = 0x6E697863
DAEMON_MAGIC = 0x6478696F

OLDEST: Version = (1, 32)
"""Of Nix 2.4. Older daemons frame errors and path infos in other ways."""
OURS: Version = (1, 38)


REALISATIONS = "realisation-with-path-not-hash"
"""The feature by which realisations can be asked for, by the path of a derivation; of Nix 2.35."""


class Op(IntEnum):
    """Operations of the daemon that we use."""

    QUERY_PATH_INFO = 26
    NAR_FROM_PATH = 38
    QUERY_REALISATION = 43


@dataclass(frozen=True, slots=True)
class Session:
    """What both sides agreed on.

    version: of the protocol, the older one of both sides; nix_version: how the daemon calls itself, "" if it
    does not say; features: those that both sides have.
    """

    version: Version
    nix_version: str
    features: frozenset[str]


def handshake() -> Steps[Session]:
    """Opens a connection."""
    yield encode_u64(CLIENT_MAGIC) + encode_u64(OURS[0] << 8 | OURS[1])
    try:
        magic = yield from read_u64()
    except HungUp as end:
        raise HungUp(f"{end}, as it does with users that it does not allow") from end
    if magic != DAEMON_MAGIC:
        raise BadInput(f"it greets with {magic.to_bytes(8, 'little')!r}, which no Nix daemon does")
    version = min(OURS, _supported((yield from read_u64())))
    features: frozenset[str] = frozenset()
    if version >= (1, 38):
        yield encode_strings((REALISATIONS,))
        features = frozenset((yield from read_strings())) & {REALISATIONS}
    yield encode_u64(0) + encode_u64(0)  # no CPU affinity, no reserved space: both are gone
    nix_version = clean((yield from read_bytes())) if version >= (1, 33) else ""
    if version >= (1, 35):
        yield from read_u64()  # whether it trusts us, which makes no difference to reading
    yield from read_until_last()
    return Session(version, nix_version, features)


def _supported(number: int) -> Version:
    version = (number >> 8, number & 0xFF)
    spoken = f"{version[0]}.{version[1]}"
    if version[0] != OURS[0]:
        raise DaemonError(f"it speaks protocol {spoken}, which is not the worker protocol 1 that we know")
    if version < OLDEST:
        raise DaemonError(
            f"it speaks protocol {spoken}, at least {OLDEST[0]}.{OLDEST[1]} is needed: "
            "run Nix 2.4 or later, or let the store's database be read with --store local"
        )
    return version


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """A question to the daemon: the bytes that ask it, and the reader of what follows the log frames."""

    request: bytes
    result: Callable[[], Reading[T]]


def perform(operation: Operation[T]) -> Steps[T]:
    """Asks one question; raises `OperationFailed` with the daemon's words if it has no answer."""
    yield operation.request
    return (yield from _answer(operation))


def perform_all(operations: Sequence[Operation[T]]) -> Steps[list[T]]:
    """Asks all questions at once and reads the answers, which come in the same order.

    If some fail, the other answers are read before the first failure is raised, so the connection stays in step.
    If the daemon hangs up after a failure, as it does when it runs out of memory, that failure is what is raised.
    Requests should be some ten kilobytes together: they are written without waiting for the daemon to read.
    """
    yield b"".join(operation.request for operation in operations)
    results: list[T] = []
    failures: list[OperationFailed] = []
    try:
        for operation in operations:
            try:
                results.append((yield from _answer(operation)))
            except OperationFailed as failure:
                failures.append(failure)
    except DaemonError as end:
        if failures:
            raise DaemonError(str(failures[0])) from end
        raise
    if failures:
        raise failures[0]
    return results


def _answer(operation: Operation[T]) -> Reading[T]:
    yield from read_until_last()
    return (yield from operation.result())


def query_path_info(path: StorePath, store_dir: str) -> Operation[PathInfo | None]:
    """What the store knows of `path`; None if it is not valid."""

    def result() -> Reading[PathInfo | None]:
        if not (yield from read_bool()):
            return None
        return (yield from _read_path_info(path, store_dir))

    return Operation(_request(Op.QUERY_PATH_INFO, path.full(store_dir)), result)


def nar_from_path(path: StorePath, store_dir: str) -> Operation[None]:
    """Makes the daemon send the NAR of `path`, which follows the answer as it is, without its size."""
    return Operation(_request(Op.NAR_FROM_PATH, path.full(store_dir)), _read_nothing)


def query_realisation(output: TracedOutput, store_dir: str) -> Operation[Realisation | None]:
    """What an output of a derivation has come out as; None if that is not known. For daemons with `REALISATIONS`."""

    def result() -> Reading[Realisation | None]:
        if not (yield from read_bool()):
            return None
        out_path = StorePath.parse_full((yield from read_string()), store_dir)
        return Realisation(out_path, readable_signatures((yield from read_strings())))

    return Operation(_request(Op.QUERY_REALISATION, output.derivation.full(store_dir), output.output), result)


def _request(op: Op, *arguments: str) -> bytes:
    return encode_u64(op) + b"".join(map(encode_string, arguments))


def _read_nothing() -> Reading[None]:
    yield from ()


def _read_path_info(path: StorePath, store_dir: str) -> Reading[PathInfo]:
    deriver = yield from _read_optional_path(store_dir)
    nar_hash = Hash.parse((yield from read_string()), "sha256")
    references = [StorePath.parse_full(text, store_dir) for text in (yield from read_strings())]
    registration_time = yield from read_u64()
    nar_size = yield from read_u64()
    ultimate = yield from read_bool()
    signatures = yield from read_strings()
    ca = yield from read_string()
    return PathInfo(
        store_path=path,
        nar_hash=nar_hash,
        nar_size=nar_size,
        references=tuple(sorted(references)),
        deriver=deriver,
        signatures=tuple(sorted(signatures)),
        ca=ca or None,
        registration_time=registration_time,
        ultimate=ultimate,
    )


def _read_optional_path(store_dir: str) -> Reading[StorePath | None]:
    text = yield from read_string()
    return StorePath.parse_full(text, store_dir) if text else None
