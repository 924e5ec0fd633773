"""What is learned of a NAR while it goes by on its way to a cache: what lies in it, and its build-facing files.

Build systems read `nix-support/*` of what was just built and pushed (Hydra: hydra-build-products, hydra-metrics,
hydra-release-name). They are small, and so is a listing: both are kept from the one pass that is made anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput
from cachesrv.nix.listing import Directory, Symlink
from cachesrv.nix.nar import NarReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cachesrv.nix.listing import ListingNode

FOLDER = "nix-support"
"""Where the build-facing files of a store path are."""

LISTING_ENTRIES = 20_000
"""A NAR with more entries is kept no listing of: for each entry, several NARs at once take some 500 bytes."""
MAX_FILES = 100
"""Build-facing files that are kept of one NAR."""
MAX_CONTENT = 256 * 1024
"""Bytes of their contents that are kept, those of all files together; of what is beyond, size and hash are known."""


class Tap(Protocol):
    """Sees a NAR go by. One of `accept` and `drop` is called, once, at the end; nothing here raises."""

    def feed(self, data: memoryview) -> None:
        """What comes next; valid during the call, which may be in any thread."""

    def accept(self) -> None:
        """That was all of it, and it is what the store says."""

    def drop(self) -> None:
        """It was not, or it was cut short."""


@dataclass(frozen=True, slots=True)
class SeenFile:
    """An entry of `nix-support`, by its name in the store path, such as `nix-support/hydra-build-products`.

    kind: `regular`, `directory` or `symlink`; target: of a symlink. Of a regular file: size in bytes, sha256 of the
    contents as 64 hexadecimal digits, and the contents if they are small.
    """

    name: str
    kind: str
    size: int = 0
    executable: bool = False
    sha256: str | None = None
    content: bytes | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What a NAR holds; `listing` is None where there can be none or it would be large."""

    listing: ListingNode | None
    files: tuple[SeenFile, ...]


class Inspection:
    """A `Tap` that hands on what it has seen. What can be read as no NAR ends the looking, not the push."""

    def __init__(self, hand_on: Callable[[Seen], None]) -> None:
        self._hand_on = hand_on
        self._reader: NarReader | None = NarReader(max_entries=LISTING_ENTRIES, on_file=self._on_file)
        self._contents: dict[str, _Contents] = {}
        self._room = MAX_CONTENT

    def feed(self, data: memoryview) -> None:
        if self._reader is None:
            return
        try:
            self._reader.feed(data)
        except BadInput:
            self._reader = None

    def accept(self) -> None:
        if self._reader is None:
            return
        try:
            self._reader.finish()
        except BadInput:
            return
        root = self._reader.root
        self._hand_on(Seen(root, tuple(self._files(root))))

    def drop(self) -> None:
        self._reader = None

    def _on_file(self, names: tuple[bytes, ...], size: int, executable: bool) -> Callable[[memoryview], None] | None:
        if len(names) != 2 or names[0] != FOLDER.encode() or len(self._contents) >= MAX_FILES:
            return None
        try:
            name = names[1].decode()
        except UnicodeDecodeError:
            return None
        keep = size <= self._room
        self._room -= size if keep else 0
        self._contents[name] = contents = _Contents(size, executable=executable, keep=keep)
        return contents.take

    def _files(self, root: ListingNode | None) -> Iterator[SeenFile]:
        """Regular ones as they went by; what else there is from the listing."""
        for name, contents in self._contents.items():
            yield contents.seen(f"{FOLDER}/{name}")
        folder = root.entries.get(FOLDER) if isinstance(root, Directory) else None
        others = folder.entries.items() if isinstance(folder, Directory) else ()
        for name, node in islice(others, MAX_FILES):
            if isinstance(node, Symlink):
                yield SeenFile(f"{FOLDER}/{name}", "symlink", target=node.target)
            elif isinstance(node, Directory):
                yield SeenFile(f"{FOLDER}/{name}", "directory")


class _Contents:
    """Of one file, as they go by."""

    def __init__(self, size: int, *, executable: bool, keep: bool) -> None:
        self._size = size
        self._executable = executable
        self._sha256 = sha256()
        self._kept: bytearray | None = bytearray() if keep else None

    def take(self, data: memoryview) -> None:
        self._sha256.update(data)
        if self._kept is not None:
            self._kept += data

    def seen(self, name: str) -> SeenFile:
        content = None if self._kept is None else bytes(self._kept)
        return SeenFile(name, "regular", self._size, self._executable, self._sha256.hexdigest(), content)
