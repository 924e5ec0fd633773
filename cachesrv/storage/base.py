"""The contract of an object store: objects by key, in the layout of a standard binary cache.

Keys are relative paths such as `main/nar/<hash>.nar.zst`: see `validate_key`. Every method validates its keys
at the door and raises BadInput for a bad one before anything happens.

What every implementation promises:

- **All or nothing.** A reader sees an object whole or not at all. What is being written is invisible until
  `commit`, and vanishes when the writer is left without it, when its task is cancelled, or (at the latest at
  the next `sweep`) after the process was killed.
- **Durable.** When `commit`, `put` or `delete` has returned, the effect survives kill -9 and power loss. That an
  object was there already is as durable as if this call had written it.
- **If absent.** `commit(replace=False)` and `put(replace=False)` create the object or leave the existing one
  as it is and answer False; of several at once, in any process, exactly one answers True. This is how a published
  object is never overwritten.
- **Cancelled.** A call that is cancelled may have taken effect, whole or not at all; when the cancellation arrives,
  nothing of the call is still at work, so buffers and names can be used again.
- **Absent is not failed.** NotFound (or None) means that the store knows that there is no such object; when it
  cannot say, it raises StoreUnavailable or another StoreError. StoreFull is raised when there is no room, as
  early as the stated size allows, and leaves nothing behind.
- **Bounded memory.** No method but `get` and `get_many` (which have a limit) holds more than a few chunks of an object.
- **Listing** comes in no promised order, in bounded memory, and may or may not see what changes meanwhile.

Whether a key can also be the folder of another (`a` beside `a/b`) is left to the implementation; none of the layout
needs it. The stores of this package are used from one event loop; several processes may share what lies behind them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import BinaryIO

STAGING = "~uploads/"
"""What the keys of objects begin with that are not whole yet, or not checked; of no cache do keys begin so."""

MAX_KEY_LENGTH = 1024
MAX_SEGMENT_LENGTH = 240

_SEGMENT = re.compile(r"[0-9A-Za-z_+=?!@~^:,%-][0-9A-Za-z_+=?!@~^:,%.-]*\Z")


def validate_key(key: str) -> str:
    """The key itself, when it is one: 1 to 1024 characters, segments joined by single slashes, each segment of
    `0-9A-Za-z_+=?!@~^:,%.-`, at most 240 long and not beginning with a dot (so no `..`, no absolute path, and
    names that begin with a dot are left to the implementation). Raises BadInput.
    """
    if len(key) > MAX_KEY_LENGTH:
        raise BadInput(f"object key of {len(key)} characters, at most {MAX_KEY_LENGTH} are allowed")
    if not all(map(is_segment, key.split("/"))):
        raise BadInput(f"not an object key: {key!r}")
    return key


def is_segment(name: str) -> bool:
    """Whether `name` can stand between the slashes of a key."""
    return len(name) <= MAX_SEGMENT_LENGTH and _SEGMENT.match(name) is not None


def validate_prefix(prefix: str) -> str:
    """The prefix itself, when it is one to list by: empty, or a key and a slash. Raises BadInput."""
    if prefix:
        if not prefix.endswith("/"):
            raise BadInput(f"not a prefix of object keys, it must end in a slash: {prefix!r}")
        validate_key(prefix[:-1])
    return prefix


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """`size` in bytes; `modified` in seconds since the epoch. `coded`: others have stored it with a Content-Encoding,
    as Nix does with metadata in S3, and the size is that of what they stored; `get` undoes it, `read` refuses it. A
    listing does not tell.
    """

    key: str
    size: int
    modified: float
    coded: bool = False


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes start up to but without end; 0 <= start < end."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class LocalFile:
    """The object lies in this file, complete and never changed in place."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class PresignedUrl:
    """The client may fetch the object there, until it expires; made without asking whether it is there."""

    url: str


@dataclass(frozen=True, slots=True)
class Stream:
    """The object is to be had by `read` only."""

    size: int


Delivery = LocalFile | PresignedUrl | Stream


class ObjectWriter(Protocol):
    """One object on its way in."""

    async def write(self, data: bytes | memoryview) -> None:
        """Append. The buffer may be reused by the caller afterwards. Raises StoreFull, StoreError; after an error
        the writer is of no more use.
        """

    async def commit(self, *, replace: bool = False) -> bool:
        """Make it durable, then visible. False when `replace` is not set and the object was there already: then
        it is as it was. Raises Mismatch when another number of bytes was written than `size` said. Afterwards
        `write` and `commit` raise StoreError.
        """


class ObjectStore(Protocol):
    """See the module's docstring for what all implementations promise."""

    def writer(self, key: str, *, size: int | None = None) -> AbstractAsyncContextManager[ObjectWriter]:
        """Begin an object of `size` bytes, if that is known; leaving without `commit` leaves nothing behind.
        On entry raises StoreFull when `size` bytes do not fit. To be used by one task at a time.
        """

    async def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """A small object in one go; answers as `commit` does."""

    async def put_many(self, objects: Mapping[str, bytes], *, replace: bool = False) -> set[str]:
        """Small objects, each as `put` would, but made durable together; the keys of those that were created or
        replaced. When it raises, any of them may have been written.
        """

    async def put_in_order(self, groups: Sequence[Mapping[str, bytes]]) -> set[str]:
        """As `put_many`, replacing nothing; who sees an object of a group sees all those of the groups before it."""

    async def get(self, key: str, *, limit: int) -> bytes | None:
        """The whole object, or None when it is not there. Raises TooLarge when it exceeds `limit` bytes."""

    async def get_many(self, keys: Collection[str], *, limit: int) -> dict[str, bytes]:
        """Those of them that are there and have at most `limit` bytes each; all are in memory together. Raises as `get`
        does for any of them.
        """

    def at_once(self, key: str, *, limit: int) -> bytes | memoryview | None:
        """The whole object, when it has at most `limit` bytes and can be had without waiting for a disk or a network;
        None in all other cases. Never blocks; a view is valid until the next call.
        """

    def warm_file(self, key: str, *, limit: int) -> tuple[int, int] | None:
        """A descriptor of the object's file, for the caller to close, and its size, when it has at most `limit` bytes
        and all of them can be had without waiting for a disk; None in all other cases. Never blocks.
        """

    def read(self, key: str, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """The object, or a part of it, in chunks. Raises NotFound before the first chunk; BadInput for a range
        beyond the end; a transfer that breaks raises StoreError, it never just ends.
        """

    async def head(self, key: str) -> ObjectInfo | None:
        """What is known of an object, or None when it is not there."""

    async def existing(self, keys: Collection[str]) -> set[str]:
        """Those of them that are there."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete them; those that are not there are passed over. Where they go one by one, those of a folder go in this
        order.
        """

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, which is empty or ends in a slash (else BadInput)."""

    async def delivery(self, key: str) -> Delivery | None:
        """How the object can best reach a client; None when it is known not to be there."""

    def leftovers(self, *, older_than: float) -> AsyncIterator[ObjectInfo]:
        """What writers left behind that have been silent for `older_than` seconds, under names that may be no keys."""

    async def sweep(self, *, older_than: float) -> int:
        """Remove such leftovers; how many there were."""

    async def close(self) -> None:
        """Let go of connections and threads; writers still open are aborted, other calls raise StoreError."""


@dataclass(frozen=True, slots=True)
class SignedPut:
    """How a part can be sent by somebody who has no credentials: by PUT to this URL, with these headers."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ArrivedPart:
    """A part that the store has: bytes, seconds since the epoch; `tag` is what the store calls its content by, which is
    mostly its MD5 in base-16.
    """

    number: int
    size: int
    tag: str
    modified: float


@dataclass(frozen=True, slots=True)
class Piece:
    """An object that was sent in one piece, by what the store called it when it was read, and the MD5 (base-16) of what
    was read.
    """

    tag: str
    md5: str


class DirectStore(Protocol):
    """Objects that others write to the store themselves, part by part or in one piece, under keys that begin with
    STAGING.

    Who has been given a SignedPut can send that part, with that content, until the upload is completed or aborted, and
    nothing else: an object that was made of parts changes no more. One that came in one piece can be sent again, with
    the same content. All parts but the last have `least` bytes or more, there are at most `most`; a piece has at most
    `largest_piece` bytes, 0 where none are taken any more. Raises StoreError.
    """

    least: int
    most: int
    largest_piece: int

    async def begin(self, key: str) -> str:
        """Begin an upload; its id."""

    async def sign(self, key: str, upload: str, number: int, md5: bytes) -> SignedPut:
        """For a part with this MD5. Makes no request."""

    async def parts(self, key: str, upload: str) -> list[ArrivedPart] | None:
        """Those that are there, by number; None when there is no such upload (any more)."""

    async def complete(self, key: str, upload: str, tags: Sequence[str]) -> None:
        """Make the object of the parts with the numbers from 1 on and these tags. Nothing happens when that was done
        before.
        """

    async def abort(self, key: str, upload: str) -> None:
        """Forget the parts; nothing happens when there are none."""

    async def sign_whole(self, key: str, size: int, md5: bytes) -> SignedPut:
        """For an object in one piece, of so many bytes and with this MD5. Makes no request."""

    async def whole(self, key: str) -> ArrivedPart | None:
        """What was sent in one piece, as its only part; None when it is not there."""

    async def publish(self, key: str, to: str, piece: Piece | None = None) -> bool:
        """Copy an object that is complete, as `commit` of an ObjectWriter makes one. Raises NotFound, also when it is
        not the `piece` that is given.
        """

    def unfinished(self) -> AsyncIterator[str]:
        """Keys of uploads that are neither completed nor aborted, among others."""

    async def sweep(self, *, older_than: float) -> int:
        """Abort uploads in which nothing has happened for so many seconds; how many there were."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """Bytes that lie in a file, which is read by position only, and may be closed when more is asked for."""

    file: BinaryIO
    part: ByteRange

    def read(self) -> bytes:
        """The bytes; this blocks. Raises StoreError when they are not there any more."""
        data = os.pread(self.file.fileno(), self.part.length, self.part.start)
        if len(data) != self.part.length:
            raise StoreError(f"{self.file.name} has become shorter")
        return data


class IncomingObject(Protocol):
    """An object on its way into a cache, that can be read as far as it has come. `written`: bytes so far."""

    written: int

    async def write(self, data: bytes) -> None:
        """Append. Raises StoreFull, StoreError."""

    async def read(self, position: int, length: int) -> bytes:
        """Bytes that were written, fewer than `length` where no more were."""

    def reopened(self) -> BinaryIO:
        """A file, for its caller to close, that has what was written; to be read by position only. Raises StoreError,
        also when it lies in none.
        """

    async def commit(self) -> None:
        """Make it visible; if it is there already, that one stays."""


class ObjectCache(Protocol):
    """Objects that are kept on this host while there is room. What is here is whole; any of it may go at any time."""

    async def get(self, key: str) -> LocalFile | None:
        """Where the object lies, None when it is not here. Gone files stay readable for those who have them open."""

    def at_once(self, key: str, *, limit: int) -> bytes | memoryview | None:
        """As `ObjectStore.at_once`."""

    def warm_file(self, key: str, *, limit: int) -> tuple[int, int] | None:
        """As `ObjectStore.warm_file`."""

    def incoming(self, key: str, size: int | None = None) -> AbstractAsyncContextManager[IncomingObject]:
        """Begin an object, with room made for its `size` bytes if that is known; leaving without `commit` leaves
        nothing behind. Raises StoreFull when there can be no room for it.
        """

    async def discard(self, key: str) -> None:
        """Forget an object."""


class LocalCopy(Protocol):
    """An object on its way into a cache as a favour: what goes wrong with that is nobody's concern."""

    async def write(self, data: bytes | memoryview) -> None:
        """Append."""

    async def keep(self) -> None:
        """Make it the object that is there under its key, instead of any other."""


class LocalCopies(Protocol):
    """Where copies are kept on this host of what is written elsewhere."""

    def begin(self, key: str, size: int | None = None) -> AbstractAsyncContextManager[LocalCopy]:
        """Begin the copy of an object of `size` bytes, if that is known; leaving without `keep` leaves nothing."""
