"""What of a NAR a server has already, by the journal and by its own word: this much need not be made again."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from cachesrv.push.retry import TryAgain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from typing import Self


class OtherBytes(TryAgain):
    """The file is not the one of which parts have arrived."""


class FrameAt(NamedTuple):
    """Where a frame begins in the file, and how many bytes it has there."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """A NAR (`sha256:<nix32>`) to the cache at a URL; `upload` is its name there, that of all that its parts depend on,
    and `level` that of the compression.
    """

    cache: str
    nar_hash: str
    upload: str
    level: int


@dataclass(frozen=True, slots=True)
class ArrivedPart:
    """`number` from 1, `size` in bytes, `digest` and `tag` as in `nar_upload.Parts`; `frames`: the compressed sizes of
    those that begin in it, the first of which has the index `first` and begins at `start` in the file.
    """

    number: int
    size: int
    digest: bytes
    tag: str
    first: int
    start: int
    frames: Sequence[int]


@dataclass(frozen=True, slots=True)
class Arrived:
    """`parts`: their numbers; `frames`: by index, those that lie in such parts from beginning to end."""

    parts: AbstractSet[int] = frozenset()
    frames: Mapping[int, FrameAt] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[ArrivedPart], part_size: int) -> Self:
        """`part_size`: of all parts but the last."""
        listed = list(parts)
        there = frozenset(part.number for part in listed)
        frames: dict[int, FrameAt] = {}
        for part in listed:
            starts = accumulate(part.frames, initial=part.start)
            for index, frame in enumerate(map(FrameAt, starts, part.frames), part.first):
                first, last = (at // part_size + 1 for at in (frame.start, frame.start + frame.size - 1))
                if first == part.number and all(number in there for number in range(first, last + 1)):
                    frames[index] = frame
        return cls(there, frames)
