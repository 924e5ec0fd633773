"""Narinfos: what a binary cache says of one store path, as lines `Key: value`.

`render` writes them to the byte as Nix does. `parse` reads them as Nix does:

- the value begins two bytes after the key, whatever the colon is followed by; no escapes, no CR, and the
  last line ends in a line feed too;
- no or an empty Compression is bzip2; the deriver `unknown-deriver` is none; an empty CA is none;
- unknown keys are passed over; of a repeated key the last value counts, but a second CA, or a second
  References after one that was not empty, is refused;
- references may come in any order and repeated, hashes in any form that has a prefix.

It is stricter where Nix releases differ or would read on into the next line: a line without a value's two
bytes, a compression that Nix does not know, a signature that is not `<name>:<base64>` of 64 bytes, numbers
that are not plain decimals below 2^63, hashes other than SHA-256, and URLs with blanks or beyond ASCII.

Source: Nix, `src/libstore/nar-info.cc` of 2.8 to 2.36.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Self

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.content_address import ContentAddress
from cachesrv.nix.hashes import Hash
from cachesrv.nix.signing import Signature, fingerprint
from cachesrv.nix.store_path import StorePath, check_store_dir

COMPRESSIONS = frozenset(
    ("none", "br", "bzip2", "compress", "grzip", "gzip", "lrzip", "lz4", "lzip", "lzma", "lzop", "xz", "zstd")
)
"""The words that Nix knows for a NAR's compression."""

DEFAULT_LIMIT = 1 << 20
"""Bytes of the largest narinfo that is read unless the caller says otherwise."""

_MAX_SIZE = 2**63 - 1
_by_base_name = attrgetter("base_name")
_match_url = re.compile(r"[!-~]+").fullmatch
_match_system = re.compile(r"[ -~]+").fullmatch


@dataclass(frozen=True, slots=True)
class NarInfo:
    """One path's entry. BadInput for values that a narinfo cannot say, so that each one can be rendered.

    `url`: of the compressed NAR, relative to the cache's or absolute. `file_hash` and `file_size` are of
    the compressed file, both may be unknown. Sizes are bytes, at least 1. `references` are kept sorted,
    `signatures` in the order given; both without repetition. `system` was written by Nix up to 2.8 or so.
    """

    store_path: StorePath
    store_dir: str
    url: str
    compression: str
    file_hash: Hash | None
    file_size: int | None
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...] = ()
    deriver: StorePath | None = None
    system: str | None = None
    signatures: tuple[Signature, ...] = ()
    ca: ContentAddress | None = None

    def __post_init__(self) -> None:
        check_store_dir(self.store_dir)
        if _match_url(self.url) is None:
            raise BadInput(f"URL {self.url[:200]!r} of a NAR is empty or has more than printable ASCII")
        if self.compression not in COMPRESSIONS:
            raise BadInput(f"compression {self.compression[:40]!r} is not known to Nix")
        _check_sha256("NarHash", self.nar_hash)
        _check_size("NarSize", self.nar_size)
        if self.file_hash is not None:
            _check_sha256("FileHash", self.file_hash)
        if self.file_size is not None:
            _check_size("FileSize", self.file_size)
        if self.system is not None and _match_system(self.system) is None:
            raise BadInput(f"System {self.system[:40]!r} is empty or has more than printable ASCII")
        if len(self.references) > 1:
            unique = sorted(set(self.references), key=_by_base_name)
            object.__setattr__(self, "references", tuple(unique))
        if len(self.signatures) > 1:
            object.__setattr__(self, "signatures", tuple(dict.fromkeys(self.signatures)))

    @property
    def full_path(self) -> str:
        """The store path with its directory."""
        return self.store_path.full(self.store_dir)

    @property
    def fingerprint(self) -> bytes:
        """What signatures of this path are made over."""
        references = [reference.full(self.store_dir) for reference in self.references]
        return fingerprint(self.full_path, self.nar_hash, self.nar_size, references)

    def add_signatures(self, signatures: Iterable[Signature]) -> Self:
        """The same with these signatures after those it has, each once."""
        return replace(self, signatures=(*self.signatures, *signatures))

    def replace_signatures(self, signatures: Iterable[Signature]) -> Self:
        """The same with these signatures in place of those under the same key names, each once."""
        added = tuple(signatures)
        names = {signature.name for signature in added}
        kept = [signature for signature in self.signatures if signature.name not in names]
        return replace(self, signatures=(*kept, *added))


def render(info: NarInfo) -> bytes:
    """The narinfo to the byte as Nix writes it; lines of what is unknown are left out.

    (Nix up to 2.34 writes `FileSize: 0` for an unknown one and demands a FileHash.)
    """
    lines = [
        f"StorePath: {info.full_path}",
        f"URL: {info.url}",
        f"Compression: {info.compression}",
    ]
    if info.file_hash is not None:
        lines.append(f"FileHash: {info.file_hash.nix32}")
    if info.file_size is not None:
        lines.append(f"FileSize: {info.file_size}")
    lines.append(f"NarHash: {info.nar_hash.nix32}")
    lines.append(f"NarSize: {info.nar_size}")
    lines.append(f"References: {' '.join([reference.base_name for reference in info.references])}")
    if info.deriver is not None:
        lines.append(f"Deriver: {info.deriver.base_name}")
    if info.system is not None:
        lines.append(f"System: {info.system}")
    lines.extend([f"Sig: {signature.render()}" for signature in info.signatures])
    if info.ca is not None:
        lines.append(f"CA: {info.ca.render()}")
    lines.append("")
    return "\n".join(lines).encode("ascii")


def parse(data: bytes, *, limit: int = DEFAULT_LIMIT) -> NarInfo:
    """Read a narinfo of at most `limit` bytes (TooLarge beyond); raises BadInput when it is corrupt."""
    if len(data) > limit:
        raise TooLarge(f"a narinfo of {len(data)} bytes exceeds the limit of {limit}")
    # A byte a character: what may stand outside ASCII is in lines that are passed over.
    text = data.decode("latin-1")
    if not text.endswith("\n"):
        raise BadInput("the narinfo is empty or its last line does not end in a line feed")
    fields = _Fields()
    for line in text[:-1].split("\n"):
        key, _, rest = line.partition(":")
        if not rest:
            raise BadInput(f"narinfo line {line[:80]!r} is not `Key: value`")
        read = _READERS.get(key)
        if read is None:
            continue
        try:
            read(fields, rest[1:])
        except BadInput as error:
            raise BadInput(f"narinfo: {key}: {error}") from None
    return fields.finish()


class _Fields:
    """The values of a narinfo as its lines come by; an attribute for each key, None where there is none."""

    def __init__(self) -> None:
        self._path: tuple[StorePath, str] | None = None
        self._url = ""
        self._compression = ""
        self._file_hash: Hash | None = None
        self._file_size: int | None = None
        self._nar_hash: Hash | None = None
        self._nar_size = 0
        self._references: list[StorePath] = []
        self._deriver: StorePath | None = None
        self._system: str | None = None
        self._signatures: list[Signature] = []
        self._ca: ContentAddress | None = None

    def store_path(self, value: str) -> None:
        store_dir, _, base_name = value.rpartition("/")
        self._path = StorePath.parse(base_name), store_dir

    def url(self, value: str) -> None:
        self._url = value

    def compression(self, value: str) -> None:
        self._compression = value

    def file_hash(self, value: str) -> None:
        self._file_hash = Hash.parse(value)

    def file_size(self, value: str) -> None:
        # Nix writes 0 for a size that it does not know.
        self._file_size = _read_size(value) or None

    def nar_hash(self, value: str) -> None:
        self._nar_hash = Hash.parse(value)

    def nar_size(self, value: str) -> None:
        self._nar_size = _read_size(value)

    def references(self, value: str) -> None:
        if self._references:
            raise BadInput("they are given twice")
        self._references = [StorePath.parse(base_name) for base_name in value.split(" ") if base_name]

    def deriver(self, value: str) -> None:
        if value != "unknown-deriver":
            self._deriver = StorePath.parse(value)

    def system(self, value: str) -> None:
        self._system = value or None

    def signature(self, value: str) -> None:
        self._signatures.append(Signature.parse(value))

    def content_address(self, value: str) -> None:
        if self._ca is not None:
            raise BadInput("it is given twice")
        self._ca = ContentAddress.parse(value) if value else None

    def finish(self) -> NarInfo:
        if self._path is None:
            raise BadInput("the narinfo lacks a StorePath")
        if self._nar_hash is None:
            raise BadInput("the narinfo lacks a NarHash")
        store_path, store_dir = self._path
        return NarInfo(
            store_path=store_path,
            store_dir=store_dir,
            url=self._url,
            compression=self._compression or "bzip2",
            file_hash=self._file_hash,
            file_size=self._file_size,
            nar_hash=self._nar_hash,
            nar_size=self._nar_size,
            references=tuple(self._references),
            deriver=self._deriver,
            system=self._system,
            signatures=tuple(self._signatures),
            ca=self._ca,
        )


_READERS: dict[str, Callable[[_Fields, str], None]] = {
    "StorePath": _Fields.store_path,
    "URL": _Fields.url,
    "Compression": _Fields.compression,
    "FileHash": _Fields.file_hash,
    "FileSize": _Fields.file_size,
    "NarHash": _Fields.nar_hash,
    "NarSize": _Fields.nar_size,
    "References": _Fields.references,
    "Deriver": _Fields.deriver,
    "System": _Fields.system,
    "Sig": _Fields.signature,
    "CA": _Fields.content_address,
}


def _read_size(value: str) -> int:
    # isdecimal() knows digits of all scripts; the length keeps int() from much work.
    if not (value.isascii() and value.isdecimal() and len(value) <= len(str(_MAX_SIZE))):
        raise BadInput(f"{value[:40]!r} is not a number of bytes")
    return int(value)


def _check_size(key: str, size: int) -> None:
    if not 1 <= size <= _MAX_SIZE:
        raise BadInput(f"{key} {size} is missing, zero or beyond {_MAX_SIZE}")


def _check_sha256(key: str, value: Hash) -> None:
    if value.algorithm != "sha256":
        raise BadInput(f"{key} is a hash by {value.algorithm}, not by sha256")
