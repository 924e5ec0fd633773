"""Where two NARs of one store path differ: file by file, by type, size, contents and executable bit."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec

from cachesrv.nix.compression import decompressed
from cachesrv.nix.hashes import Hash
from cachesrv.nix.listing import Directory, Symlink
from cachesrv.nix.nar import NarReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cachesrv.nix.listing import ListingNode

_MAX_ENTRIES = 100_000
"""Entries up to which a tree is kept; of a larger one only its files are compared."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file (`regular`, with its size in bytes and the base-16 sha256 of its contents), a `directory`, or a `symlink`
    to `target`.
    """

    type: str
    size: int = 0
    executable: bool = False
    sha256: str = ""
    target: str = ""

    def __str__(self) -> str:
        if self.type == "symlink":
            return f"a link to {self.target}"
        if self.type == "directory":
            return "a directory"
        return f"{self.size} bytes, sha256 {self.sha256[:16]}…{', executable' if self.executable else ''}"


class Contents(msgspec.Struct, frozen=True):
    """What a NAR with this hash holds: entries by name from the root, which is called `.`."""

    nar_hash: Hash
    entries: dict[str, Entry]


class Difference(msgspec.Struct, frozen=True):
    """What is called so, here and there; None where there is no such thing."""

    name: str
    here: Entry | None
    there: Entry | None

    def __str__(self) -> str:
        if self.there is None:
            return f"{self.name}: only here, {self.here}"
        if self.here is None:
            return f"{self.name}: only there, {self.there}"
        return f"{self.name}: here {self.here}; there {self.there}"


def contents(compression: str, chunks: Iterator[bytes]) -> Contents:
    """Read a whole compressed NAR. Raises BadInput. Blocks."""
    whole = sha256()
    files: dict[tuple[bytes, ...], tuple[int, bool, Any]] = {}

    def on_file(path: tuple[bytes, ...], size: int, executable: bool) -> Callable[[memoryview], None]:
        hasher = sha256()
        files[path] = size, executable, hasher
        return hasher.update

    reader = NarReader(max_entries=_MAX_ENTRIES, on_file=on_file)
    for piece in decompressed(compression, chunks):
        whole.update(piece)
        reader.feed(piece)
    reader.finish()
    entries = {
        _name(path): Entry("regular", size, executable, hasher.hexdigest())
        for path, (size, executable, hasher) in files.items()
    }
    if reader.root is not None:
        entries = dict(_entries(reader.root, ".", entries))
    return Contents(Hash("sha256", whole.digest()), entries)


def differences(here: Mapping[str, Entry], there: Mapping[str, Entry]) -> list[Difference]:
    """In order of names; what is in a directory that only one of them has is left out."""
    found = [
        Difference(name, here.get(name), there.get(name))
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    trees = {
        one.name
        for one in found
        if one.here is None or one.there is None or "directory" in {one.here.type, one.there.type}
    }
    return [one for one in found if trees.isdisjoint(_parents(one.name))]


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _entries(node: ListingNode, name: str, files: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    if isinstance(node, Directory):
        yield name, Entry("directory")
        for child, inner in node.entries.items():
            yield from _entries(inner, child if name == "." else f"{name}/{child}", files)
    elif isinstance(node, Symlink):
        yield name, Entry("symlink", target=node.target)
    else:
        yield name, files.get(name, Entry("regular", 0, node.executable, sha256().hexdigest()))


def _name(path: tuple[bytes, ...]) -> str:
    return b"/".join(path).decode("utf-8", "backslashreplace") or "."
