"""What a verification has done so far, on disk: one that was interrupted goes on from there.

A file of lines, each one JSON: `{"terms": …, "begun": …}`, then `{"flaw": …}` and `{"position": …, "counts": …}`, and
perhaps `{"repairing": true}`. What stands after the last position was not finished, and is found again.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from cachesrv.errors import BadInput, StoreError, StoreUnavailable
from cachesrv.nix import json_document
from cachesrv.services.flaws import Flaw  # noqa: TC001  msgspec reads what stands in annotations

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_FORGOTTEN_AFTER = 7 * 24 * 3600
"""Seconds after which it says little what was looked at."""


class Position(msgspec.Struct, frozen=True):
    """Up to where everything was looked at: in a stage of a cache, all up to `after` in its order."""

    cache: str
    stage: str
    after: str = ""


class Counts(msgspec.Struct):
    """What was looked at, and how many flaws there are of each kind. `nars` were read, with `bytes` in all. `young`
    objects, which the catalog does not know, may be on their way: they were not judged.
    """

    paths: int = 0
    nars: int = 0
    bytes: int = 0
    seconds: float = 0.0
    young: int = 0
    flaws: dict[str, int] = {}


class _Line(msgspec.Struct, omit_defaults=True):
    terms: dict[str, str] | None = None
    begun: float = 0.0
    flaw: Flaw | None = None
    position: Position | None = None
    counts: Counts | None = None
    repairing: bool = False


_encode = msgspec.json.Encoder().encode


def _decode(line: bytes) -> _Line:
    return json_document.decode(line, _Line, what="a line of the journal")


class Journal:
    """`terms` say what is looked at; what was noted under other ones, or too long ago, is forgotten, as it is when the
    run is to be a `fresh` one. Blocks. Raises StoreError, StoreUnavailable while another process has it open.
    """

    def __init__(self, path: Path, terms: Mapping[str, str], *, fresh: bool = False) -> None:
        self._path = path
        self.position: Position | None = None
        self.counts = Counts()
        self.begun = time.time()
        with self._in_words():
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")  # noqa: PTH123, SIM115  a descriptor, open for long
        try:
            self._lock()
            with self._in_words():
                end = 0 if fresh else self._read(dict(terms))
                self._file.truncate(end)
                self._file.seek(end)
                if not end:
                    self._write([_Line(terms=dict(terms), begun=self.begun)])
        except BaseException:
            self._file.close()
            raise

    def note(self, position: Position | None, flaws: Iterable[Flaw]) -> None:
        """These were found; and when a position is given, all up to there was looked at, with the present counts."""
        lines = [_Line(flaw=flaw) for flaw in flaws]
        if position:
            self.position = position
            lines.append(_Line(position=position, counts=self.counts))
        with self._in_words():
            self._write(lines)

    def flaws(self) -> Iterator[Flaw]:
        """All that were noted."""
        with self._in_words(), self._path.open("rb") as file:
            for line in file:
                if flaw := _decode(line).flaw:
                    yield flaw

    def repairing(self) -> None:
        """What was found is being changed: if that is interrupted, all is to be looked at anew."""
        with self._in_words():
            self._write([_Line(repairing=True)])

    def finish(self) -> None:
        """The run is done: the next one begins anew."""
        with self._in_words():
            # Not removed: who waits for its lock would then have one of his own.
            self._file.truncate(0)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreUnavailable("another process is verifying with this data directory; try again later") from None

    def _read(self, terms: dict[str, str]) -> int:
        """Take up what was noted; where that ends, 0 when it is of no use."""
        end = known = 0
        for number, text in enumerate(self._file):
            end += len(text)
            try:
                line = _decode(text)
            except BadInput:
                break
            if line.repairing:
                known = 0
                break
            if number == 0 and (line.terms != terms or time.time() - line.begun > _FORGOTTEN_AFTER):
                break
            self.begun = line.begun if number == 0 else self.begun
            if line.position and line.counts:
                known, self.position, self.counts = end, line.position, line.counts
        if not known:
            self.position, self.counts, self.begun = None, Counts(), time.time()
        return known

    def _write(self, lines: Iterable[_Line]) -> None:
        self._file.write(b"".join(_encode(line) + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self._path} cannot be used: {error.strerror}") from error
