"""Index of debug information: which NAR holds the debug file of a build id.

`debuginfo/<build id>.debug` holds `{"archive": "../<URL of the NAR>", "member": "<path inside of it>"}`.
Hydra's uploader leaves `.debug` out of the name. A build id is 40 lower-case hexadecimal digits.

Source: Nix, `src/libstore/binary-cache-store.cc` (index-debug-info).
"""

import re
from dataclasses import dataclass

import msgspec

from cachesrv.errors import BadInput
from cachesrv.nix import json_document

DEFAULT_LIMIT = 1 << 16
"""Bytes of the largest entry that is read unless the caller says otherwise."""

_match_build_id = re.compile(r"[0-9a-f]{40}").fullmatch
_match_ascii = re.compile(r"[!-~]+").fullmatch
# Segments that are not empty and do not lead upwards, between slashes.
_match_path = re.compile(r"(?!/)(?:(?:/|^)(?!\.\.?(?:/|\Z))[^/\0]+)+").fullmatch


def is_build_id(text: str) -> bool:
    """Whether `text` is a build id: 40 lower-case hexadecimal digits."""
    return _match_build_id(text) is not None


@dataclass(frozen=True, slots=True)
class DebugInfo:
    """`url`: of the NAR as in its narinfo, relative to the cache. `member`: path of the file in the NAR."""

    url: str
    member: str


class _Entry(msgspec.Struct):
    archive: str
    member: str


def parse(data: bytes, *, limit: int = DEFAULT_LIMIT) -> DebugInfo:
    """Read the JSON of an entry, at most `limit` bytes (TooLarge beyond).

    Raises BadInput when it is corrupt, or when archive or member lead elsewhere than into this cache.
    """
    entry = json_document.decode(data, _Entry, what="an entry of debuginfo", limit=limit)
    up, _, url = entry.archive.partition("/")
    if up != ".." or _match_ascii(url) is None or _match_path(url) is None:
        raise BadInput(f"{entry.archive[:200]!r} is not ../<URL of a NAR>")
    if _match_path(entry.member) is None:
        raise BadInput(f"{entry.member[:200]!r} is not the path of a file in a NAR")
    return DebugInfo(url, entry.member)
