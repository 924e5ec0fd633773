"""Store paths: `<store dir>/<hash part>-<name>`, and how Nix computes them.

The hash part is 20 bytes in Nix's base-32. The digest of a path is the SHA-256 of

    <type>:sha256:<inner digest in base-16>:<store dir>:<name>

folded to 20 bytes; the type says what the inner digest is of (see `content_address`).
Source: Nix, manual `protocols/store-path.md`, `src/libstore/path.cc`, `src/libstore/store-dir-config.cc`.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from cachesrv.errors import BadInput
from cachesrv.nix import base32
from cachesrv.nix.hashes import Hash

DEFAULT_STORE_DIR = "/nix/store"
HASH_PART_LENGTH = 32
MAX_NAME_LENGTH = 211

_DIGEST_SIZE = 20
_match_hash_part = re.compile(f"[{base32.ALPHABET}]{{{HASH_PART_LENGTH}}}").fullmatch
# Nix denies `.` and `..` also as the part before the first dash.
_match_name = re.compile(rf"(?!\.\.?(?:-|\Z))[0-9A-Za-z+\-._?=]{{1,{MAX_NAME_LENGTH}}}").fullmatch
_match_store_dir = re.compile(r"(?:/(?!\.\.?(?:/|\Z))[ -.0-~]+)+").fullmatch


def is_hash_part(text: str) -> bool:
    """Whether `text` is 32 characters of Nix's base-32, and so may be looked up."""
    return _match_hash_part(text) is not None


def is_name(text: str) -> bool:
    """Whether `text` may be the name of a store path; outputs of derivations follow the same rule."""
    return _match_name(text) is not None


@lru_cache(maxsize=64)
def check_store_dir(store_dir: str) -> str:
    """Return the directory when it is an absolute, normalised path of printable ASCII, else BadInput."""
    if _match_store_dir(store_dir) is None:
        raise BadInput(f"store directory {store_dir[:200]!r} is not a normalised absolute path")
    return store_dir


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A path below a store directory, which is not part of it; ordered as base names are.

    `hash_part` is 32 characters of base-32, `name` 1 to 211 of `0-9A-Za-z+-._?=`; BadInput otherwise.
    """

    hash_part: str
    name: str

    def __post_init__(self) -> None:
        if _match_hash_part(self.hash_part) is None:
            raise BadInput(f"{self.hash_part[:60]!r} is not the hash part of a store path")
        if _match_name(self.name) is None:
            raise BadInput(f"{self.name[:250]!r} is not the name of a store path")

    def __hash__(self) -> int:
        return hash(self.hash_part)  # which tells paths apart; closures are sets and dictionaries of them

    @classmethod
    def parse(cls, base_name: str) -> Self:
        """Read `<hash part>-<name>`; raises BadInput."""
        if base_name[HASH_PART_LENGTH : HASH_PART_LENGTH + 1] != "-":
            raise BadInput(f"{base_name[:250]!r} is not <hash part>-<name> of a store path")
        return cls(base_name[:HASH_PART_LENGTH], base_name[HASH_PART_LENGTH + 1 :])

    @classmethod
    def parse_full(cls, path: str, store_dir: str) -> Self:
        """Read `<store_dir>/<hash part>-<name>`; raises BadInput, also for a path in another directory."""
        if not path.startswith(f"{store_dir}/"):
            raise BadInput(f"{path[:300]!r} is not in the store directory {store_dir}")
        return cls.parse(path[len(store_dir) + 1 :])

    @property
    def base_name(self) -> str:
        """`<hash part>-<name>`"""
        return f"{self.hash_part}-{self.name}"

    @property
    def is_derivation(self) -> bool:
        """Whether the name says that a derivation lies there."""
        return self.name.endswith(".drv")

    def full(self, store_dir: str) -> str:
        """`<store_dir>/<hash part>-<name>`"""
        return f"{store_dir}/{self.hash_part}-{self.name}"

    def __str__(self) -> str:
        return self.base_name


def make_store_path(type_: str, inner: Hash, name: str, store_dir: str) -> StorePath:
    """The store path of a thing of this type (`source`, `text:<ref>…`, `output:out` …).

    `inner` is the hash of what the type says. Raises BadInput when the name is none of a store path.
    """
    if _match_name(name) is None:
        raise BadInput(f"{name[:250]!r} is not the name of a store path")
    preimage = f"{type_}:{inner.base16}:{check_store_dir(store_dir)}:{name}".encode("ascii")
    return StorePath(base32.encode(_fold(hashlib.sha256(preimage).digest())), name)


def _fold(digest: bytes) -> bytes:
    """XOR the bytes after the 20th into the first ones: collisions stay as hard, guessing a preimage too."""
    head = int.from_bytes(digest[:_DIGEST_SIZE], "little")
    tail = int.from_bytes(digest[_DIGEST_SIZE:], "little")
    return (head ^ tail).to_bytes(_DIGEST_SIZE, "little")
