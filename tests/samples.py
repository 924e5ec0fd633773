"""Store paths as a client would push them, made from a name and some bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import zstandard

from cachesrv.nix import narinfo
from cachesrv.nix.base32 import encode
from cachesrv.nix.compression import SUFFIXES
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar import token
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.store_path import DEFAULT_STORE_DIR, StorePath


def file_nar(content: bytes) -> bytes:
    """The NAR of a plain file."""
    words = (b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")")
    return b"".join(map(token, words))


def directory_nar(*names: bytes) -> bytes:
    """The NAR of a directory of empty files, in the order given."""
    empty = b"".join(map(token, (b"(", b"type", b"regular", b"contents", b"", b")")))
    entries = (b"".join(map(token, (b"entry", b"(", b"name", name, b"node"))) + empty + token(b")") for name in names)
    start = b"".join(map(token, (b"nix-archive-1", b"(", b"type", b"directory")))
    return start + b"".join(entries) + token(b")")


def path_of(name: str) -> StorePath:
    """The path of this name, whatever is in it: as for what is built, two contents of one path are possible."""
    return StorePath(encode(Hash.of("sha256", name.encode()).digest[:20]), name)


@dataclass(frozen=True)
class Sample:
    """A path whose content is a plain file. Its NAR is called by the file's hash, as Nix does."""

    name: str
    content: bytes = b"some bytes"
    references: tuple[StorePath, ...] = ()
    compression: str = "none"

    @property
    def path(self) -> StorePath:
        return path_of(self.name)

    @cached_property
    def nar(self) -> bytes:
        return file_nar(self.content)

    @cached_property
    def file(self) -> bytes:
        """The NAR as it is sent."""
        return self.nar if self.compression == "none" else zstandard.ZstdCompressor().compress(self.nar)

    @property
    def nar_hash(self) -> Hash:
        return Hash.of("sha256", self.nar)

    @property
    def nar_name(self) -> str:
        return file_name(self.file, self.compression)

    @property
    def nar_url(self) -> str:
        """Where its NAR is in the cache `main`."""
        return f"/main/nar/{self.nar_name}"

    @property
    def narinfo_url(self) -> str:
        """Where its narinfo is in the cache `main`."""
        return f"/main/{self.path.hash_part}.narinfo"

    @property
    def info(self) -> NarInfo:
        return NarInfo(
            store_path=self.path,
            store_dir=DEFAULT_STORE_DIR,
            url=f"nar/{self.nar_name}",
            compression=self.compression,
            file_hash=Hash.of("sha256", self.file),
            file_size=len(self.file),
            nar_hash=self.nar_hash,
            nar_size=len(self.nar),
            references=self.references,
        )

    def narinfo(self, **changes: Any) -> bytes:
        """Its text, with some fields changed."""
        return narinfo.render(replace(self.info, **changes))


def file_name(file: bytes, compression: str = "none") -> str:
    """What Nix calls a compressed NAR."""
    return f"{Hash.of('sha256', file).bare_nix32}.nar{SUFFIXES[compression]}"
