"""What `cachesrv verify` says: to people and to programs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

import click
import msgspec
import structlog

from cachesrv.services import amounts
from cachesrv.services.flaws import Kind
from cachesrv.services.verify import YOUNG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachesrv.services.flaws import Flaw
    from cachesrv.services.repair import Outcome
    from cachesrv.services.verify_journal import Counts, Journal

_LINE_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""
_REDRAWN_EVERY = 0.2
_LOGGED = 100
"""Flaws that are logged of one verification; the others are counted."""


class Output(Protocol):
    """A `Listener` of `cachesrv.services.verify` and `cachesrv.services.repair` that also says how it begins and ends;
    `repaired` says how often each result of a repair came about.
    """

    def begin(self, journal: Journal) -> None: ...
    def stage(self, cache: str, stage: str, total: int | None) -> None: ...
    def flaw(self, flaw: Flaw) -> None: ...
    def progress(self, counts: Counts) -> None: ...
    def outcome(self, outcome: Outcome) -> None: ...
    def sum_up(self, counts: Counts, repaired: Mapping[str, int] | None) -> None: ...


class _Progress:
    """On stderr: a line that is drawn again on a terminal, one now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._stage = ""
        self._told = time.monotonic()

    def begin(self, journal: Journal) -> None:
        if journal.position:
            click.echo(f"going on with what was begun {amounts.date(int(journal.begun))}", err=True)

    def stage(self, cache: str, stage: str, total: int | None) -> None:
        ahead = "" if total is None else f", {total}"
        self._stage = f"{cache}: {stage}{ahead}" if cache else stage
        if not self._terminal:
            click.echo(self._stage, err=True)

    def progress(self, counts: Counts) -> None:
        if time.monotonic() - self._told < (_REDRAWN_EVERY if self._terminal else _LINE_EVERY):
            return
        self._told = time.monotonic()
        read = f", {amounts.size(counts.bytes)} read" if counts.nars else ""
        text = f"{self._stage}: {counts.paths} paths{read}, {sum(counts.flaws.values())} flaws"
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True, nl=not self._terminal)

    def clear(self) -> None:
        if self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)


class Lines:
    """For people."""

    def __init__(self) -> None:
        self._progress = _Progress()
        self.begin = self._progress.begin
        self.stage = self._progress.stage
        self.progress = self._progress.progress

    def flaw(self, flaw: Flaw) -> None:
        """See Listener."""
        self._progress.clear()
        where = ": ".join(part for part in (flaw.cache, flaw.path or flaw.object) if part)
        click.echo(f"{where}: {flaw.what} ({flaw.kind})")

    def outcome(self, outcome: Outcome) -> None:
        """See Listener."""
        where = ": ".join(part for part in (outcome.cache, outcome.path) if part)
        back = f"; to get it back: {outcome.get_back}" if outcome.get_back else ""
        click.echo(f"{where}: {outcome.result}: {outcome.what}{back}")

    def sum_up(self, counts: Counts, repaired: Mapping[str, int] | None) -> None:
        """The last lines."""
        self._progress.clear()
        read = f", NARs read: {counts.nars} ({amounts.size(counts.bytes)})" if counts.nars else ""
        total = sum(counts.flaws.values())
        well = "no flaws" if counts.young else "all is well"
        click.echo(f"paths looked at: {counts.paths}{read}; {f'flaws: {total}' if total else well}")
        for label, number in sorted(counts.flaws.items()):
            click.echo(f"  {number} {label}" + ("" if repaired else f": {Kind.of(label).advice}"))
        if counts.young:
            click.echo(
                f"  {counts.young} not judged: objects that the catalog does not know, younger than"
                f" {amounts.time(YOUNG)}; a push may be at work, else `cachesrv reindex` publishes their paths"
            )
        if repaired:
            click.echo(", ".join(f"{number} {result}" for result, number in repaired.items()))


class JsonLines:
    """For programs."""

    def __init__(self) -> None:
        self._progress = _Progress()
        self.begin = self._progress.begin
        self.stage = self._progress.stage
        self.progress = self._progress.progress

    def flaw(self, flaw: Flaw) -> None:
        """See Listener."""
        click.echo(json.dumps({"event": "flaw", **msgspec.structs.asdict(flaw), "advice": flaw.advice}))

    def outcome(self, outcome: Outcome) -> None:
        """See Listener."""
        click.echo(json.dumps({"event": "repair", **asdict(outcome)}))

    def sum_up(self, counts: Counts, repaired: Mapping[str, int] | None) -> None:
        """The last line."""
        self._progress.clear()
        click.echo(json.dumps({"event": "summary", **msgspec.structs.asdict(counts), **(repaired or {})}))


class Logged:
    """For the log of the server that has had this done; `flaws` is how many there were."""

    def __init__(self) -> None:
        self.flaws = 0
        self._log = structlog.get_logger()

    def begin(self, journal: Journal) -> None:
        """See Output."""

    def stage(self, cache: str, stage: str, total: int | None) -> None:
        """See Listener."""

    def progress(self, counts: Counts) -> None:
        """See Listener."""

    def flaw(self, flaw: Flaw) -> None:
        """See Listener."""
        self.flaws += 1
        if self.flaws <= _LOGGED:
            self._log.error("flaw", **msgspec.structs.asdict(flaw))

    def outcome(self, outcome: Outcome) -> None:
        """Nothing is repaired."""

    def sum_up(self, counts: Counts, repaired: Mapping[str, int] | None) -> None:  # noqa: ARG002  see outcome
        """The last line."""
        click.echo(json.dumps({"event": "summary", **msgspec.structs.asdict(counts)}))
