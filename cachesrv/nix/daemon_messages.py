"""What the Nix daemon says before it answers: log lines, activities, and why an operation failed.

Before the result of each operation the daemon sends frames, each headed by a number that tells its kind, up to LAST
(the result follows) or ERROR (there is none). [Nix, src/libstore/worker-protocol-connection.cc, daemon.cc]
"""

import re
from collections import deque
from enum import IntEnum

from cachesrv.errors import BadInput, DaemonError
from cachesrv.nix.wire import Reading, decode, encode_string, encode_u64, read_bytes, read_u64

MAX_MESSAGE = 16 << 20
"""Bytes of one log line or error; builders and evaluators can be wordy."""
MAX_SHOWN = 2000
"""Characters of a daemon's message that we pass on."""

NAR_END = encode_string(")")
TAIL = 64 << 10
"""Bytes at the end of a NAR among which an error is looked for; more than an error takes."""

ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\s]+")


class OperationFailed(DaemonError):
    """The daemon said why it did not do an operation; the connection is still in step."""


class HungUp(DaemonError):
    """The daemon ended the connection; thrown into an exchange by who drives it."""


class Frame(IntEnum):
    """Kinds of frames."""

    LAST = 0x616C7473
    ERROR = 0x63787470
    NEXT = 0x6F6C6D67
    READ = 0x64617461
    WRITE = 0x64617416
    START_ACTIVITY = 0x53545254
    STOP_ACTIVITY = 0x53544F50
    RESULT = 0x52534C54


def clean(message: str | bytes) -> str:
    """The message as one line without colours and control characters, fit for a terminal and a log."""
    text = message.decode(errors="replace") if isinstance(message, bytes) else message
    text = CONTROL.sub(" ", ANSI.sub("", text)).strip()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def read_until_last() -> Reading[None]:
    """Reads past all frames up to LAST; raises `OperationFailed` with the daemon's words at ERROR.

    Log lines and activities are dropped: nothing that we ask for has progress worth showing.
    """
    while True:
        kind = yield from read_u64()
        if kind == Frame.LAST:
            return
        if kind == Frame.ERROR:
            raise OperationFailed((yield from read_error()))
        if kind == Frame.NEXT:
            yield from read_bytes(MAX_MESSAGE)
        elif kind == Frame.START_ACTIVITY:
            yield from _skip_activity()
        elif kind == Frame.STOP_ACTIVITY:
            yield from read_u64()
        elif kind == Frame.RESULT:
            yield 16
            yield from _skip_fields()
        elif kind in (Frame.READ, Frame.WRITE):
            raise BadInput("it wants to exchange data in an operation that has none")
        else:
            raise BadInput(f"a frame of unknown kind {kind:#x}")


def read_error() -> Reading[str]:
    """The body of an ERROR frame: the message, and in brackets what the daemon was doing."""
    kind = yield from read_bytes()
    if kind != b"Error":
        raise BadInput(f"an error of unknown type {kind[:80]!r}")
    yield 8  # level
    yield from read_bytes()  # a name that is no longer used
    message = yield from read_bytes(MAX_MESSAGE)
    yield from _no_position()
    traces = deque[str](maxlen=8)  # the innermost come last, and say the most
    for _ in range((yield from read_u64())):
        yield from _no_position()
        traces.append(clean((yield from read_bytes(MAX_MESSAGE))))
    text = clean(message) or "an error without a message"
    return f"{text} ({'; '.join(traces)})" if traces else text


def find_error(data: bytes) -> str | None:
    """The message of the first whole ERROR frame anywhere in data.

    A daemon that fails in the middle of a NAR puts the frame among the bytes of the NAR and hangs up.
    """
    start = data.find(encode_u64(Frame.ERROR) + encode_string("Error"))
    if start < 0:
        return None
    try:
        return decode(read_error(), data[start + 8 :])
    except BadInput:
        return None


def _skip_activity() -> Reading[None]:
    yield 24  # id, level, type
    yield from read_bytes(MAX_MESSAGE)
    yield from _skip_fields()
    yield 8  # parent


def _skip_fields() -> Reading[None]:
    for _ in range((yield from read_u64())):
        kind = yield from read_u64()
        if kind == 0:
            yield 8
        elif kind == 1:
            yield from read_bytes(MAX_MESSAGE)
        else:
            raise BadInput(f"a field of unknown type {kind}")


def _no_position() -> Reading[None]:
    if (yield from read_u64()) != 0:
        raise BadInput("an error with a position, which no daemon sends")


class NarTail:
    """Remembers how a NAR of `size` bytes ended that the daemon sent without framing.

    Feed all chunks in order, `left` bytes at most; then ask whether the NAR is whole and, if not, what the daemon
    said about it. Keeps the last TAIL bytes and no more than one chunk beyond.
    """

    def __init__(self, size: int) -> None:
        self.left = size
        self._recent = deque[bytes]()
        self._kept = 0

    def feed(self, chunk: bytes) -> None:
        self.left -= len(chunk)
        self._recent.append(chunk)
        self._kept += len(chunk)
        while self._kept - len(self._recent[0]) >= TAIL:
            self._kept -= len(self._recent.popleft())

    @property
    def whole(self) -> bool:
        """Whether all bytes came and the last ones end a NAR, not something else."""
        return not self.left and b"".join(self._recent).endswith(NAR_END)

    def error(self, rest: bytes = b"") -> str | None:
        """Why the daemon broke off, if it said so in these bytes or in the `rest` that came after them."""
        return find_error(b"".join(self._recent) + rest)
