"""The framing that Nix's protocols share: integers, strings, lists.

An integer is an unsigned 64-bit number, least byte first. A string is its length, its bytes, and zeros up to the
next multiple of 8. A list (or a set, sorted) is a count and its items. [Nix, src/libutil/serialise.cc]

Encoders return bytes. Readers do no I/O: they are generators that yield how many bytes they need next, are sent
exactly those, and return the value. Whoever drives one decides where bytes come from and how long to wait. They
raise `BadInput` for what Nix would not send, `TooLarge` before asking for more than a stated limit, so that memory
is bounded whatever a length claims.
"""

from collections.abc import Collection, Generator
from typing import TypeAlias, TypeVar

from cachesrv.errors import BadInput, TooLarge

T = TypeVar("T")
Reading: TypeAlias = Generator[int, bytes, T]

ALIGNMENT = 8
MAX_STRING = 1 << 20
"""Bytes that a string may have, where the reader does not say otherwise."""
MAX_LIST = 64 << 20
"""Bytes that all items of one list may have together, their lengths included."""


def encode_u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def encode_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return encode_u64(len(data)) + data + bytes(-len(data) % ALIGNMENT)


def encode_strings(texts: Collection[str]) -> bytes:
    """A list of strings in the order given; for a set, sort them first."""
    return encode_u64(len(texts)) + b"".join(map(encode_string, texts))


def read_u64() -> Reading[int]:
    return int.from_bytes((yield 8), "little")


def read_bool() -> Reading[bool]:
    """True for any number but 0, as Nix reads it."""
    return (yield from read_u64()) != 0


def read_bytes(limit: int = MAX_STRING) -> Reading[bytes]:
    """A string as it stands, of at most `limit` bytes."""
    length = yield from read_u64()
    if length > limit:
        raise TooLarge(f"a string of {length} bytes is announced, at most {limit} are allowed here")
    if not length:
        return b""
    padded = yield length + -length % ALIGNMENT
    if any(padded[length:]):
        raise BadInput("a string is padded with something other than zeros")
    return padded[:length]


def read_string(limit: int = MAX_STRING) -> Reading[str]:
    """A string that must be UTF-8."""
    data = yield from read_bytes(limit)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadInput(f"a string is not UTF-8: {data[:80]!r}") from None


def read_strings(limit: int = MAX_LIST) -> Reading[list[str]]:
    """A list of UTF-8 strings, in the order sent, of at most `limit` bytes together."""
    count = yield from read_u64()
    if count * ALIGNMENT > limit:
        raise TooLarge(f"a list of {count} strings is announced, at most {limit} bytes are allowed here")
    texts: list[str] = []
    left = limit
    for _ in range(count):
        text = yield from read_string()
        left -= ALIGNMENT + len(text)
        if left < 0:
            raise TooLarge(f"a list of strings exceeds {limit} bytes")
        texts.append(text)
    return texts


def decode(reading: Reading[T], data: bytes) -> T:
    """What `reading` makes of the start of `data`; `BadInput` where data ends too early."""
    at = 0
    needed = next(reading)
    while True:
        if at + needed > len(data):
            raise BadInput(f"ends after {len(data)} bytes, {at + needed} are needed")
        at += needed
        try:
            needed = reading.send(data[at - needed : at])
        except StopIteration as stop:
            value: T = stop.value
            return value
