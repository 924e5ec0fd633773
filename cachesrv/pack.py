"""Packs: many small NARs in the body of one request, see `cachesrv.api`.

4 bytes    size of the head, least byte first
head       JSON, an `api.PackHead`
files      the compressed NARs one behind the other, as many bytes each as the head says
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import msgspec

from cachesrv.api import PackHead, PackLimits
from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix import json_document

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMITS = PackLimits(nars=1000, size=8 * 1024 * 1024, nar_size=1024 * 1024, head_size=4 * 1024 * 1024)
"""Of the packs that our server takes."""

_SIZE = 4


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack that was received; `files` are views of its body, one for each NAR of the head."""

    head: PackHead
    files: Sequence[memoryview]


def largest(limits: PackLimits) -> int:
    """Bytes of the largest pack."""
    return _SIZE + limits.head_size + limits.size


def encode(head: PackHead, files: Sequence[bytes]) -> bytes:
    """The body of a request. Raises TooLarge for a head that has no place in it."""
    encoded = msgspec.json.encode(head)
    if len(encoded) >= 1 << 8 * _SIZE:
        raise TooLarge(f"the head of a pack has {len(encoded)} bytes")
    return b"".join((len(encoded).to_bytes(_SIZE, "little"), encoded, *files))


def decode(body: bytes | bytearray, limits: PackLimits) -> Pack:
    """Raises BadInput for what is no pack, TooLarge for one beyond the limits."""
    size = int.from_bytes(body[:_SIZE], "little")
    if size > limits.head_size:
        raise TooLarge(f"the head of the pack has {size} bytes, at most {limits.head_size} are taken")
    if len(body) < _SIZE + size:
        raise BadInput(f"the pack ends early: it has {len(body)} bytes, its head alone {size}")
    view = memoryview(body)
    head = json_document.decode(view[_SIZE : _SIZE + size], PackHead, what="the head of the pack")
    if len(head.nars) > limits.nars:
        raise TooLarge(f"{len(head.nars)} NARs in one pack, at most {limits.nars} are taken")
    borders = [*accumulate((nar.file_size for nar in head.nars), initial=_SIZE + size)]
    if borders[-1] != len(body):
        raise BadInput(f"the pack has {len(body)} bytes, by its head it has {borders[-1]}")
    return Pack(head, [view[start:end] for start, end in pairwise(borders)])
