"""Listings of NARs (`.ls`, version 1): the tree inside a NAR and where each file's contents lie.

A listing is JSON, `{"root": NODE, "version": 1}`, and NODE is one of

    {"type": "regular", "size": N, "executable": BOOL, "narOffset": N}
    {"type": "directory", "entries": {NAME: NODE, ...}}
    {"type": "symlink", "target": TEXT}

`narOffset` counts bytes of the uncompressed NAR up to the first byte of the contents, so that a reader can
fetch one member with a range request. Source: Nix, `src/libutil/memory-source-accessor/json.cc` and
`src/libstore/binary-cache-store.cc`; what is written here is what current Nix writes, to the byte.
"""

from typing import Annotated

from msgspec import Meta, Struct
from msgspec.json import Encoder

from cachesrv.errors import BadInput
from cachesrv.nix import json_document

MAX_DEPTH = 64
"""Nodes from the root to the deepest one, both included, as Nix limits NARs since 2.35."""

MAX_LISTING_SIZE = 32 * 1024 * 1024
"""Bytes of JSON that `parse` takes: some 300,000 entries with names of common length."""

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Regular(Struct, frozen=True, gc=False, tag="regular", tag_field="type", rename="camel"):
    """A file: size in bytes, owner's execute bit, offset of the contents in the uncompressed NAR.

    `nar_offset` is 0 where a listing does not state where the contents lie (or how long they are):
    contents never begin at 0.
    """

    size: _Count = 0
    executable: bool = False
    nar_offset: _Count = 0


class Symlink(Struct, frozen=True, gc=False, tag="symlink", tag_field="type"):
    """A symbolic link and the text that it holds."""

    target: str


class Directory(Struct, frozen=True, tag="directory", tag_field="type"):
    """A directory: name -> node."""

    entries: "dict[str, Regular | Directory | Symlink]"


ListingNode = Regular | Directory | Symlink


class ListingBuilder:
    """Grows a listing from the nodes of a NAR in the NAR's order.

    A NAR's names are bytes and a listing's are text: where a name or a target is not UTF-8 there is no
    listing, `root` is None (Nix 2.8.0 writes such bytes as they are, which no JSON parser takes), unless
    `any_names` are taken: then those bytes are surrogates, as in Python's names of files, and the tree is
    for no `.ls` object. Nor is there one of more than `max_entries` entries. An entry counts once more for
    each 64 bytes of its texts, so that memory stays under about 500 bytes for each of `max_entries`.
    """

    def __init__(self, max_entries: int, *, any_names: bool = False) -> None:
        self._room = max_entries
        self._errors = "surrogateescape" if any_names else "strict"
        self._open: list[dict[str, ListingNode]] = [{}]

    @property
    def root(self) -> ListingNode | None:
        """The finished tree, or None where there is no listing."""
        return self._open[0].get("") if self._open else None

    def add(self, name: bytes, node: ListingNode, weight: int = 0) -> None:
        """Puts a leaf into the innermost open directory; the root is the one named `b""`."""
        if not self._open:
            return
        self._room -= 1 + (len(name) + weight) // 64
        try:
            self._open[-1][name.decode(errors=self._errors)] = node
        except UnicodeDecodeError:
            self._open = []
        if self._room < 0:
            self._open = []

    def add_symlink(self, name: bytes, target: bytes) -> None:
        """Puts a symbolic link into the innermost open directory."""
        try:
            self.add(name, Symlink(target.decode(errors=self._errors)), weight=len(target))
        except UnicodeDecodeError:
            self._open = []

    def enter(self, name: bytes) -> None:
        """Opens a directory: what is added from here on is in it."""
        entries: dict[str, ListingNode] = {}
        self.add(name, Directory(entries))
        if self._open:
            self._open.append(entries)

    def leave(self, levels: int) -> None:
        """Closes the innermost `levels` directories."""
        if self._open:
            del self._open[-levels:]


class _Listing(Struct):
    root: ListingNode
    version: int = 1


_encoder = Encoder(order="sorted")


def render(root: ListingNode) -> bytes:
    """The JSON of a `.ls` object; entries and keys are sorted, so equal trees give equal bytes."""
    return _encoder.encode(_Listing(root))


def render_node(node: ListingNode) -> bytes:
    """The JSON of a node alone, as Nix keeps it beside NARs that it has fetched."""
    return _encoder.encode(node)


def parse(data: bytes) -> ListingNode:
    """The root of a listing.

    As Nix does, takes a node without `size`, `executable` or `narOffset`, and passes over unknown keys.
    Raises BadInput for anything that is no listing of version 1, for names that no NAR can hold and for
    trees of more than MAX_DEPTH; TooLarge beyond MAX_LISTING_SIZE.
    """
    listing = json_document.decode(data, _Listing, what="a listing", limit=MAX_LISTING_SIZE)
    if listing.version != 1:
        raise BadInput(f"listing of version {listing.version}; only version 1 is known")
    _check(listing.root)
    return listing.root


def find(root: ListingNode, path: str) -> ListingNode | None:
    """The node at `path` (`bin/hello`, a leading slash is allowed, `""` is the root), links not followed."""
    node = root
    for name in path.split("/"):
        if not name:
            continue
        child = node.entries.get(name) if isinstance(node, Directory) else None
        if child is None:
            return None
        node = child
    return node


def _check(root: ListingNode) -> None:
    level = [root]
    for _ in range(MAX_DEPTH):
        directories = [node for node in level if isinstance(node, Directory)]
        if not directories:
            return
        for directory in directories:
            _check_names(directory)
        level = [child for directory in directories for child in directory.entries.values()]
    if level:
        raise BadInput(f"listing is deeper than {MAX_DEPTH} levels")


def _check_names(directory: Directory) -> None:
    for name in directory.entries:
        if name in {"", ".", ".."} or "/" in name or "\0" in name:
            raise BadInput(f"listing has an entry named {name!r}")
