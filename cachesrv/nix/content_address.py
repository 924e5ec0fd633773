"""Content addresses: what a path's contents hash to, and the store path that follows from it.

    text:sha256:<hash>                 a file that names its references (derivations, builtins.toFile)
    fixed:<algorithm>:<hash>           a file ("flat")
    fixed:r:<algorithm>:<hash>         the NAR ("recursive")
    fixed:git:<algorithm>:<hash>       the Git object

Nix writes the hash in base-32 and reads base-16 and base-64 too, but no SRI.

A content address stands in for a signature when two things hold: the store path is the one that follows
from it (`claims_path`, metadata only), and the contents hash to it (`ContentCheck`, as they stream by).

Source: Nix, `src/libstore/content-address.cc`, `src/libstore/store-dir-config.cc`; for self-references
`src/libstore/references.cc` (HashModuloSink) and LocalStore::addToStore.
"""

import hashlib
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Self

from cachesrv.errors import BadInput, Mismatch, TooLarge
from cachesrv.nix.hashes import SIZES, Hash
from cachesrv.nix.store_path import HASH_PART_LENGTH, StorePath, make_store_path

MAX_SELF_REFERENCES = 1 << 20
"""Occurrences of the own hash part that are kept for one path, 8 bytes each."""


class Method(Enum):
    """How contents are turned into the bytes that are hashed; the value begins the content address."""

    TEXT = "text:"
    FLAT = "fixed:"
    RECURSIVE = "fixed:r:"
    GIT = "fixed:git:"


# `fixed:` begins the others too, so that it is tried last.
_BY_PREFIX = (Method.TEXT, Method.RECURSIVE, Method.GIT, Method.FLAT)
_ALGORITHMS: dict[Method, Collection[str]] = {
    Method.TEXT: ("sha256",),
    Method.FLAT: SIZES,
    Method.RECURSIVE: SIZES,
    Method.GIT: ("sha1", "sha256"),
}


@dataclass(frozen=True, slots=True)
class ContentAddress:
    """A method and the hash by it; BadInput where the method does not know the algorithm."""

    method: Method
    hash: Hash

    def __post_init__(self) -> None:
        if self.hash.algorithm not in _ALGORITHMS[self.method]:
            raise BadInput(f"no content address {self.method.value} is made with {self.hash.algorithm}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one of the forms above; raises BadInput."""
        for method in _BY_PREFIX:
            if text.startswith(method.value):
                digits = text[len(method.value) :]
                if ":" not in digits:
                    raise BadInput(f"content address {text[:200]!r} lacks <algorithm>:<hash>")
                return cls(method, Hash.parse(digits))
        raise BadInput(f"content address {text[:200]!r} begins neither with text: nor with fixed:")

    def render(self) -> str:
        """The text as Nix writes it, for example `fixed:r:sha256:<nix32>`."""
        return self.method.value + self.hash.nix32

    @property
    def covers(self) -> Literal["nar", "file"] | None:
        """What `ContentCheck` has to be fed with.

        "nar": the whole NAR. "file": the bytes of the file; the NAR has to hold one regular file that
        is not executable, and nothing else (Nix makes no others). None: cannot be checked here.
        """
        if self.method is Method.GIT:
            return None
        return "nar" if self.method is Method.RECURSIVE else "file"


def store_path_for(
    address: ContentAddress,
    name: str,
    references: Iterable[StorePath],
    store_dir: str,
    *,
    self_reference: bool = False,
) -> StorePath:
    """The store path that a thing with this content address, name and references has.

    `references` leaves out the path itself, which `self_reference` stands for. Raises BadInput when
    the method allows no such references, or the name is none of a store path.
    """
    others = sorted({reference.full(store_dir) for reference in references})
    if address.method is Method.TEXT:
        if self_reference:
            raise BadInput("a content address of text allows no reference to itself")
        return make_store_path(":".join(["text", *others]), address.hash, name, store_dir)
    if address.method is Method.RECURSIVE and address.hash.algorithm == "sha256":
        type_ = ":".join(["source", *others, *(["self"] if self_reference else [])])
        return make_store_path(type_, address.hash, name, store_dir)
    if others or self_reference:
        raise BadInput(f"a content address {address.method.value}{address.hash.algorithm} allows no references")
    prefix = address.method.value.removeprefix("fixed:")
    inner = Hash.of("sha256", f"fixed:out:{prefix}{address.hash.base16}:".encode("ascii"))
    return make_store_path("output:out", inner, name, store_dir)


def claims_path(address: ContentAddress, path: StorePath, references: Iterable[StorePath], store_dir: str) -> bool:
    """Whether `path` is the one that follows from the content address, its name and its references.

    `references` may hold `path` itself, as a narinfo's do. Says nothing about the contents.
    """
    references = set(references)
    try:
        implied = store_path_for(address, path.name, references - {path}, store_dir, self_reference=path in references)
    except BadInput:
        return False
    return implied == path


class HashModulo:
    """Hash of bytes in which a path's own hash part counts as zeros, so that they can hold it.

    After the bytes come, in order, `|<offset in decimal>` for each occurrence. Bytes arrive in chunks of
    any size. Memory: one chunk, and 8 bytes for each occurrence up to `limit`.
    """

    def __init__(self, algorithm: str, hash_part: str, *, limit: int = MAX_SELF_REFERENCES) -> None:
        if algorithm not in SIZES:
            raise BadInput(f"{algorithm[:40]!r} is not a hash algorithm of store paths")
        self._algorithm = algorithm
        self._hasher = hashlib.new(algorithm, usedforsecurity=False)
        self._own = hash_part.encode("ascii")
        self._limit = limit
        self._held = b""  # the last bytes, among which an occurrence may begin
        self._position = 0  # offset of the first of them
        self._offsets = array("Q")

    @property
    def occurrences(self) -> int:
        """How often the own hash part was found so far."""
        return len(self._offsets)

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes; raises TooLarge beyond `limit` occurrences."""
        window = self._held + data
        view = memoryview(window)
        done = 0
        while (found := window.find(self._own, done)) >= 0:
            if len(self._offsets) == self._limit:
                raise TooLarge(f"the contents refer to their own path more than {self._limit} times")
            self._hasher.update(view[done:found])
            self._hasher.update(bytes(HASH_PART_LENGTH))
            self._offsets.append(self._position + found)
            done = found + HASH_PART_LENGTH
        sure = max(done, len(window) - HASH_PART_LENGTH + 1)
        self._hasher.update(view[done:sure])
        self._held = window[sure:]
        self._position += sure

    def finish(self) -> Hash:
        """The hash of all; nothing may be fed afterwards."""
        self._hasher.update(self._held)
        for offset in self._offsets:
            self._hasher.update(b"|%d" % offset)
        return Hash(self._algorithm, self._hasher.digest())


class ContentCheck:
    """Whether the contents of a path are what its content address says, checked as they stream by.

    Feed what `address.covers` says. Raises BadInput at once where that is None.
    """

    def __init__(self, address: ContentAddress, path: StorePath) -> None:
        if address.covers is None:
            raise BadInput(f"the content address {address.render()} of Git objects cannot be checked here")
        self._address = address
        self._path = path
        self._sink = HashModulo(address.hash.algorithm, path.hash_part)

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the contents; raises TooLarge as `HashModulo` does."""
        self._sink.update(data)

    def finish(self) -> None:
        """Raises Mismatch unless the contents hash to the content address."""
        found = self._sink.finish()
        # Nix up to 2.8 hashes text as it is and later ones as above: they agree where this cannot occur.
        if self._address.method is Method.TEXT and self._sink.occurrences:
            raise Mismatch(f"{self._path} is text that refers to itself, which no content address allows")
        if found != self._address.hash:
            raise Mismatch(
                f"the contents of {self._path} hash to {found.nix32}, its content address says {self._address.render()}"
            )
