"""What is wrong with a path, judged by what the stores say of it. Pure: no store is asked here."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, CachesrvError
from cachesrv.index.base import Absent, Present
from cachesrv.nix import narinfo
from cachesrv.nix.content_address import claims_path
from cachesrv.nix.narinfo import NarInfo
from cachesrv.services.flaws import Flaw, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cachesrv.catalog.base import PathRecord
    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.caches import ServedCache

_NAR_URL = re.compile(r"nar/[^/?]+\Z")
_FIELDS = {
    "url": "URL",
    "compression": "Compression",
    "file_hash": "FileHash",
    "file_size": "FileSize",
    "nar_hash": "NarHash",
    "nar_size": "NarSize",
    "references": "References",
    "deriver": "Deriver",
    "system": "System",
    "signatures": "Sig",
    "ca": "CA",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the stores say of one path: `text` is its narinfo in storage, None if there is none, or why it cannot be
    read; `answer` what the index says.
    """

    hash_part: str
    record: PathRecord | None
    text: bytes | CachesrvError | None
    answer: Present | Absent | None


@dataclass(slots=True)
class Reading:
    """What a path's narinfo, as it is served, comes to: `info` is None when it cannot be used; `path` is the base name,
    or the hash part where no more is known.
    """

    hash_part: str
    path: str
    info: NarInfo | None
    flaws: list[Flaw]


class _Wrong(Exception):
    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


class PathJudge:
    """Judges the paths of one cache. `keys`, by name, are those whose signatures can be told right from wrong."""

    def __init__(self, cache: ServedCache, keys: Mapping[str, PublicKey]) -> None:
        self._cache = cache
        self._keys = keys

    def read(self, seen: Seen) -> Reading:
        """What is wrong with it by itself, wherever its NAR and its references are."""
        if seen.record:
            return self._read_published(seen, seen.record)
        reading = Reading(seen.hash_part, seen.hash_part, None, [])
        if seen.text is None:
            return reading
        try:
            reading.info = self._valid(seen.hash_part, seen.text)
            reading.path = reading.info.store_path.base_name
            self._check_trust(reading, reading.info)
        except _Wrong as wrong:
            self.add(reading, wrong.kind, wrong.what)
        return reading

    def add(self, reading: Reading, kind: Kind, what: str, key: str = "") -> None:
        """A flaw of a path, about its narinfo unless another object is named."""
        about = key or self._cache.narinfo_key(reading.hash_part)
        reading.flaws.append(Flaw(kind.label, self._cache.name, what, reading.path, about))

    def usable(self, hash_part: str, text: bytes | CachesrvError | None) -> NarInfo | None:
        """What a narinfo says, if it is one of this path and cache and its signatures hold."""
        try:
            return None if text is None else self._valid(hash_part, text)
        except _Wrong:
            return None

    def standing(self, info: NarInfo) -> int:
        """How much a usable narinfo is to be believed: 2 with a signature by a known key, 1 with others, 0 without. One
        that was cut off has lost its signatures, and before them what it refers to.
        """
        if any(one.name in self._keys for one in info.signatures):
            return 2
        return 1 if info.signatures else 0

    def _read_published(self, seen: Seen, record: PathRecord) -> Reading:
        reading = Reading(record.hash_part, f"{record.hash_part}-{record.name}", None, [])
        try:
            reading.info = self._valid(record.hash_part, record.narinfo)
            for what in _contradictions(self._cache, record, reading.info):
                self.add(reading, Kind.DISAGREEMENT, what)
            self._check_trust(reading, reading.info)
        except _Wrong as wrong:
            self.add(reading, wrong.kind, f"{wrong.what} (so says the catalog)")
        try:
            self._compare(seen, record, reading.info)
        except _Wrong as wrong:
            self.add(reading, wrong.kind, wrong.what)
        for what in _misanswers(seen, record):
            self.add(reading, Kind.WRONG_INDEX_ENTRY, what)
        return reading

    def _compare(self, seen: Seen, record: PathRecord, info: NarInfo | None) -> None:
        """What lies in storage with what the catalog has. Raises _Wrong."""
        if seen.text is None:
            raise _Wrong(Kind.MISSING_NARINFO, "its narinfo is not in storage")
        if seen.text == record.narinfo:
            return
        there = self._valid(seen.hash_part, seen.text)
        if info and narinfo.render(there) != record.narinfo:
            raise _Wrong(Kind.DISAGREEMENT, f"storage and catalog differ: {_difference(there, info)}")

    def _valid(self, hash_part: str, text: bytes | CachesrvError) -> NarInfo:
        """A narinfo that is one of this path and cache, and whose signatures hold. Raises _Wrong."""
        if isinstance(text, CachesrvError):
            raise _Wrong(Kind.UNREADABLE_NARINFO, f"its narinfo cannot be read: {text}")
        try:
            info = narinfo.parse(text)
        except BadInput as error:
            raise _Wrong(Kind.UNREADABLE_NARINFO, f"its narinfo is none: {error}") from error
        if info.store_path.hash_part != hash_part:
            raise _Wrong(Kind.FOREIGN_NARINFO, f"its narinfo is that of {info.store_path}")
        if info.store_dir != self._cache.store_dir:
            raise _Wrong(
                Kind.FOREIGN_NARINFO,
                f"its narinfo is of a path in {info.store_dir}, this cache is for {self._cache.store_dir}",
            )
        if not _NAR_URL.match(info.url):
            raise _Wrong(Kind.FOREIGN_NARINFO, f"its narinfo leads to {info.url}, NARs are looked for below nar/")
        self._check_signatures(info)
        return info

    def _check_signatures(self, info: NarInfo) -> None:
        if info.ca and not claims_path(info.ca, info.store_path, info.references, info.store_dir):
            raise _Wrong(Kind.WRONG_SIGNATURE, f"its content address {info.ca.render()} does not lead to it")
        known = [(self._keys[one.name], one) for one in info.signatures if one.name in self._keys]
        wrong = [one.name for key, one in known if not key.verify(info.fingerprint, one)]
        if wrong:
            raise _Wrong(Kind.WRONG_SIGNATURE, f"its signature by {' and '.join(wrong)} does not hold")

    def _check_trust(self, reading: Reading, info: NarInfo) -> None:
        """Signatures that hold are enough: a cache may have come to trust others than when it took the path in."""
        trusted = {*self._cache.trusted_keys, *(key.name for key in self._cache.signing_keys)}
        if self._cache.trusted_keys and not info.ca and trusted.isdisjoint(one.name for one in info.signatures):
            self.add(reading, Kind.UNTRUSTED_NARINFO, "it has no signature by a key that the cache trusts")


def _contradictions(cache: ServedCache, record: PathRecord, info: NarInfo) -> Iterator[str]:
    """What the catalog notes of a path beside its narinfo, and should have taken from it."""
    said: dict[str, tuple[object, object]] = {
        "name": (record.name, info.store_path.name),
        "NAR": (record.nar_key, cache.key(info.url)),
        "NarHash": (record.nar_hash, info.nar_hash.nix32),
        "NarSize": (record.nar_size, info.nar_size),
        "FileSize": (record.file_size, record.file_size if info.file_size is None else info.file_size),
        "References": (sorted(record.references), [reference.base_name for reference in info.references]),
    }
    for what, (noted, stated) in said.items():
        if noted != stated:
            yield f"the catalog notes {what} {noted}, and its narinfo there says {stated}"


def _misanswers(seen: Seen, record: PathRecord) -> Iterator[str]:
    if isinstance(seen.answer, Absent):
        yield "the index says that it is not there"
    elif seen.answer and seen.answer.body != record.narinfo:
        yield "the index answers with another narinfo than the catalog has"


def _difference(there: NarInfo, known: NarInfo) -> str:
    names = [name for name in (field.name for field in fields(NarInfo)) if getattr(there, name) != getattr(known, name)]
    said = [f"{_FIELDS[name]} {_text(getattr(there, name))} and {_text(getattr(known, name))}" for name in names[:3]]
    return ", ".join(said)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value)) or "none"
    render = getattr(value, "render", None)
    return str(render()) if render else str(value)
