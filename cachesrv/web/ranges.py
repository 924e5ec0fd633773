"""Range requests. Pure. Source: RFC 9110, 13 and 14."""

from __future__ import annotations

import re

from cachesrv.errors import BadInput
from cachesrv.storage.base import ByteRange

_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})\Z")


class Unsatisfiable(BadInput):
    """No byte of the range is there; `size` is how many bytes are."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the range lies outside of the {size} bytes that there are")
        self.size = size


def requested(header: str | None, size: int) -> ByteRange | None:
    """The part of `size` bytes that a Range header asks for; None means all of it.

    A header that is malformed, of another unit or of several ranges is passed over, as RFC 9110 (14.2) allows.
    Raises Unsatisfiable.
    """
    match = _RANGE.match(header) if header else None
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= end:
        raise Unsatisfiable(size)
    return ByteRange(start, end)


def matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names this (quoted) ETag."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def range_holds(if_range: str | None, etag: str | None) -> bool:
    """Whether a Range is to be honoured in the face of If-Range: only for the very same object."""
    return if_range is None or if_range.strip() == etag
