"""A path that somebody wants published: what the two ways in, a narinfo and the push API, say of it alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cachesrv.errors import BadInput
from cachesrv.nix.content_address import ContentAddress
from cachesrv.nix.hashes import Hash
from cachesrv.nix.signing import Signature, fingerprint
from cachesrv.nix.store_path import StorePath

if TYPE_CHECKING:
    from cachesrv.api import PathToPublish
    from cachesrv.nix.narinfo import NarInfo


@dataclass(frozen=True, slots=True)
class FileClaim:
    """What a narinfo says of the compressed file: its name under `nar/`, and what it should be found to be."""

    name: str
    compression: str
    file_hash: Hash | None
    file_size: int | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """`file` is None where the NAR is to be found by its hash."""

    store_path: StorePath
    store_dir: str
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...]
    deriver: StorePath | None
    signatures: tuple[Signature, ...]
    ca: ContentAddress | None
    file: FileClaim | None

    @classmethod
    def from_narinfo(cls, info: NarInfo) -> Self:
        """Raises BadInput for a URL that leads out of the cache."""
        directory, _, name = info.url.rpartition("/")
        if directory != "nar" or not name:
            raise BadInput(f"URL is {info.url[:200]!r}, expected nar/<file> in this cache")
        return cls(
            store_path=info.store_path,
            store_dir=info.store_dir,
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            references=info.references,
            deriver=info.deriver,
            signatures=info.signatures,
            ca=info.ca,
            file=FileClaim(name, info.compression, info.file_hash, info.file_size),
        )

    @classmethod
    def from_api(cls, path: PathToPublish, store_dir: str) -> Self:
        """Raises BadInput for names, hashes, signatures and content addresses that are none."""
        return cls(
            store_path=StorePath.parse(path.path),
            store_dir=store_dir,
            nar_hash=Hash.parse(path.nar_hash),
            nar_size=path.nar_size,
            references=tuple(StorePath.parse(reference) for reference in path.references),
            deriver=StorePath.parse(path.deriver) if path.deriver else None,
            signatures=tuple(Signature.parse(signature) for signature in path.signatures),
            ca=ContentAddress.parse(path.ca) if path.ca else None,
            file=None,
        )

    @property
    def fingerprint(self) -> bytes:
        """What signatures of this path are made over."""
        references = [reference.full(self.store_dir) for reference in self.references]
        return fingerprint(self.store_path.full(self.store_dir), self.nar_hash, self.nar_size, references)
