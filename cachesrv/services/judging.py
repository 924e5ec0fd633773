"""A narinfo as it lies in storage, judged: whether it describes a path that the cache can serve."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from cachesrv.catalog.base import PathRecord
from cachesrv.errors import BadInput
from cachesrv.nix import narinfo
from cachesrv.nix.narinfo_scan import Scanned, scan
from cachesrv.services.findings import Finding, FoundPath
from cachesrv.services.flaws import Flaw, Kind

if TYPE_CHECKING:
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.findings import Listed

_NAR_URL = re.compile(r"nar/([^/?]+)\Z")


def judge(cache: ServedCache, listed: Listed, text: bytes) -> Finding:
    """What its text says; its NAR is not looked at."""
    try:
        said = scan(text)
        if said is None:
            info = narinfo.parse(text)
            said, text = _said(info), narinfo.render(info)
    except BadInput as error:
        return flawed(listed, Kind.UNREADABLE_NARINFO, str(error))
    if said.hash_part != listed.hash_part:
        return flawed(listed, Kind.FOREIGN_NARINFO, f"it is the narinfo of {said.hash_part}-{said.name}")
    if said.store_dir != cache.store_dir:
        why = f"its path lies in {said.store_dir}, this cache is for {cache.store_dir}"
        return flawed(listed, Kind.FOREIGN_NARINFO, why)
    match = _NAR_URL.match(said.url)
    if match is None:
        return flawed(listed, Kind.FOREIGN_NARINFO, f"it leads to {said.url}, NARs are looked for below nar/")
    path = FoundPath(
        name=said.name,
        narinfo=text,
        nar=match[1],
        nar_hash=said.nar_hash,
        nar_size=said.nar_size,
        file_size=said.file_size or 0,
        references=said.references,
        deriver=said.deriver,
        ca=said.ca,
        modified=int(listed.modified),
    )
    return Finding(listed.size, listed.modified, path)


def with_nar(finding: Finding, size: int | None) -> Finding:
    """The same, now that its NAR is known to have `size` bytes, or not to be there."""
    path = finding.path
    if path is None or path.file_size == size:
        return finding
    if size is None:
        return flawed(finding, Kind.MISSING_NAR, f"its NAR nar/{path.nar} is not there")
    if path.file_size:
        return flawed(finding, Kind.WRONG_SIZE, f"its NAR nar/{path.nar} has {size} bytes, it says {path.file_size}")
    return msgspec.structs.replace(finding, path=msgspec.structs.replace(path, file_size=size))


def flawed(narinfo: Listed | Finding, kind: Kind, why: str) -> Finding:
    """The finding that it cannot be served."""
    return Finding(narinfo.size, narinfo.modified, flaw=kind.label, why=why)


def record_of(cache: ServedCache, hash_part: str, path: FoundPath) -> PathRecord:
    """As the catalog is to know it."""
    return PathRecord(
        cache=cache.name,
        hash_part=hash_part,
        name=path.name,
        narinfo=path.narinfo,
        nar_key=cache.key(f"nar/{path.nar}"),
        nar_hash=path.nar_hash,
        nar_size=path.nar_size,
        file_size=path.file_size,
        references=path.references,
        deriver=path.deriver,
        ca=path.ca,
        registered_at=path.modified,
    )


def flaw_of(cache: ServedCache, hash_part: str, kind: Kind, what: str) -> Flaw:
    """A flaw of a narinfo, or of what it leads to."""
    return Flaw(kind.label, cache.name, what, path=hash_part, object=cache.narinfo_key(hash_part))


def _said(info: narinfo.NarInfo) -> Scanned:
    return Scanned(
        store_dir=info.store_dir,
        hash_part=info.store_path.hash_part,
        name=info.store_path.name,
        url=info.url,
        compression=info.compression,
        file_size=info.file_size,
        nar_hash=info.nar_hash.nix32,
        nar_size=info.nar_size,
        references=tuple(reference.base_name for reference in info.references),
        deriver=info.deriver.base_name if info.deriver else None,
        ca=info.ca.render() if info.ca else None,
    )
