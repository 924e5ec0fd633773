"""Flaws of a cache, told: to people the first of them and what to do about each kind; to programs all of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import click
import msgspec

from cachesrv.services.flaws import Kind

if TYPE_CHECKING:
    from cachesrv.services.flaws import Flaw

_SHOWN = 20


class FlawLines:
    """For people, in the end: they may be looking at bars on the same terminal until then."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []
        self._kinds: Counter[str] = Counter()

    def tell(self, flaw: Flaw) -> None:
        """One was found."""
        self.count += 1
        self._kinds[flaw.kind] += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"{flaw.cache}: {flaw.path or flaw.object}: {flaw.what} ({flaw.kind})")

    def sum_up(self) -> None:
        """Name them."""
        for line in self._first:
            click.echo(line)
        if self.count > len(self._first):
            click.echo(f"and {self.count - len(self._first)} more, which --json names")
        for label, number in sorted(self._kinds.items()):
            click.echo(f"  {number} {label}: {Kind.of(label).advice}")


class FlawEvents:
    """For programs: `{"event": "flaw", …}` for each, at once."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self, flaw: Flaw) -> None:
        """One was found."""
        self.count += 1
        click.echo(json.dumps({"event": "flaw", **msgspec.structs.asdict(flaw), "advice": flaw.advice}))

    def sum_up(self) -> None:
        """They have been named."""
