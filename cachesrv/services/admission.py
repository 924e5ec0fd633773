"""The rules by which a path enters a cache. Pure: what is known comes in, a narinfo or an error comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, Conflict, Mismatch, MissingReferences, Unsigned
from cachesrv.nix.content_address import claims_path
from cachesrv.nix.hashes import Hash
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.signing import verify_any
from cachesrv.services.caches import ReferencePolicy

if TYPE_CHECKING:
    from collections.abc import Container

    from cachesrv.catalog.base import NarRecord
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.candidate import Candidate

_NAMED = 5
"""Missing references that are named in an error; the rest is counted."""


def check_claims(cache: ServedCache, path: Candidate) -> None:
    """What can be judged by what is said alone. Raises BadInput."""
    if path.store_dir != cache.store_dir:
        raise BadInput(f"the path lies in {path.store_dir}, this cache is for {cache.store_dir}")
    if path.ca is not None and not claims_path(path.ca, path.store_path, path.references, path.store_dir):
        raise BadInput(f"the content address {path.ca.render()} does not lead to {path.store_path}")


def check_immutable(path: Candidate, published: NarInfo | None) -> None:
    """A published path keeps its contents. Raises Conflict with both hashes."""
    if published is None:
        return
    if published.store_path != path.store_path:
        raise Conflict(f"{published.store_path} is published, which has the hash part of {path.store_path}")
    if published.nar_hash != path.nar_hash:
        raise Conflict(
            f"{path.store_path} is published with the NAR hash {published.nar_hash.nix32} and was pushed with "
            f"{path.nar_hash.nix32}: its build is not deterministic; the published one stays"
        )


def check_nar(path: Candidate, nar: NarRecord) -> None:
    """It says of its NAR what was found when that was read. Raises Mismatch."""
    _equal("NarHash", path.nar_hash.nix32, nar.nar_hash)
    _equal("NarSize", path.nar_size, nar.nar_size)
    if path.file is None:
        return
    _equal("Compression", path.file.compression, nar.compression)
    if path.file.file_hash is not None:
        _equal("FileHash", path.file.file_hash.nix32, nar.file_hash)
    if path.file.file_size is not None:
        _equal("FileSize", path.file.file_size, nar.file_size)


def _equal(field: str, stated: str | int, found: str | int) -> None:
    if stated != found:
        raise Mismatch(f"{field} says {stated}, but the NAR that is here has {found}")


def check_references(cache: ServedCache, path: Candidate, resolved: Container[str]) -> None:
    """`resolved` has the hash parts that are published, or will be before this path. Raises MissingReferences."""
    if cache.references is ReferencePolicy.ANY:
        return
    missing = [
        reference.base_name
        for reference in path.references
        if reference != path.store_path and reference.hash_part not in resolved
    ]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise MissingReferences(
            f"{path.store_path} refers to what is not in the cache: {', '.join(missing[:_NAMED])}{more}; "
            "push the references first"
        )


def check_trust(cache: ServedCache, path: Candidate, *, content_addressed: bool) -> None:
    """A cache with trusted keys takes what they signed, and what its content address vouches for. Raises Unsigned."""
    if not cache.trusted_keys or content_addressed:
        return
    if not verify_any(path.fingerprint, path.signatures, cache.trusted_keys):
        trusted = ", ".join(sorted(cache.trusted_keys))
        raise Unsigned(f"{path.store_path} has no signature by a key that this cache trusts: {trusted}")


def to_publish(cache: ServedCache, path: Candidate, nar: NarRecord, published: NarInfo | None) -> NarInfo:
    """The narinfo as it will be served: its NAR as it is stored, and signed with the cache's keys beside the signatures
    that it brought and those that it had. A signature in the name of one of the cache's keys is always our own.
    """
    foreign = [*(published.signatures if published else ()), *path.signatures]
    ours = [key.sign(path.fingerprint) for key in cache.signing_keys]
    names = {signature.name for signature in ours}
    return NarInfo(
        store_path=path.store_path,
        store_dir=path.store_dir,
        url=nar.key.removeprefix(cache.key("")),
        compression=nar.compression,
        file_hash=Hash.parse(nar.file_hash),
        file_size=nar.file_size,
        nar_hash=path.nar_hash,
        nar_size=path.nar_size,
        references=path.references,
        deriver=path.deriver,
        signatures=(*ours, *(signature for signature in foreign if signature.name not in names)),
        ca=path.ca,
    )
