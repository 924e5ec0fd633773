"""Events of a push as text: lines for people, JSON lines for scripts. For bars on a terminal see `progress_bars`.

People read progress and failures on stderr; results, which are the summary and what `--dry-run` would do, go to stdout.
JSON lines go to stdout, all of them but Sent, which says nothing that Stored does not say at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self, TextIO

import msgspec

from cachesrv.push.events import Event, Failed, Noted, PlanMade, Planned, Resumed, Retrying, Sent, Stored, Summary
from cachesrv.push.one_line import one_line
from cachesrv.services import amounts

if TYPE_CHECKING:
    from types import TracebackType

_LONGEST_ERROR = 2000

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Rendering(Protocol):
    """Shows events; a context in which it may use the terminal."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __call__(self, event: Event) -> None:
        """Show one event."""


class JsonLines:
    """One object a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Sent):
            self._out.write(_json(event) + "\n")
            self._out.flush()


class Lines:
    """A line for each NAR that has been sent and for whatever goes wrong."""

    def __init__(self, out: TextIO, err: TextIO, *, dry_run: bool = False) -> None:
        self._out = out
        self._err = err
        self._dry_run = dry_run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        match event:
            case Planned() if self._dry_run:
                self._print(self._out, f"{event.decision:8} {event.path}  {size_text(event.nar_size)}: {event.reason}")
            case PlanMade() if event.nars or event.realisations:
                self._print(self._err, plan_text(event))
            case Stored():
                sent = f"as {size_text(event.sent_bytes)}" if event.sent_bytes else "was there already"
                self._print(self._err, f"sent {event.path}  {size_text(event.nar_size)} {sent}")
            case Resumed():
                there = f"{event.parts} of {amounts.count(event.all_parts, 'part')}, {size_text(event.resumed_bytes)}"
                self._print(self._err, f"resumed {event.path}  {there}, had been sent before")
            case Failed() | Retrying() | Noted():
                self._print(self._err, trouble_text(event))
            case Summary():
                self._print(self._out, summary_text(event, dry_run=self._dry_run))

    def _print(self, to: TextIO, line: str) -> None:
        to.write(line + "\n")
        to.flush()


def _json(event: Event) -> str:
    try:
        return msgspec.json.encode(event).decode()
    except UnicodeEncodeError:  # it has the name of a file, which need not be UTF-8
        import json  # noqa: PLC0415  seldom needed

        return json.dumps(msgspec.to_builtins(event), separators=(",", ":"))


def plan_text(plan: PlanMade) -> str:
    """What is going to be done."""
    text = (
        f"{plan.upload + plan.publish} of {amounts.count(plan.paths, 'path')} to push, "
        f"{amounts.count(plan.nars, 'NAR')} of {size_text(plan.nar_bytes)}"
    )
    return f"{text}, {amounts.count(plan.realisations, 'realisation')}" if plan.realisations else text


def trouble_text(event: Failed | Retrying | Noted) -> str:
    """What went wrong."""
    if isinstance(event, Noted):
        return f"note: {one_line(event.text, _LONGEST_ERROR)}"
    if isinstance(event, Failed):
        error = event.error.removeprefix(f"{event.path} ")  # a server's line names the path itself
        return f"failed {one_line(event.path)}: {one_line(error, _LONGEST_ERROR)}"
    return f"{event.error}; trying again in {event.delay:.1f} s ({event.what}, attempt {event.attempt})"


def summary_text(summary: Summary, *, dry_run: bool = False) -> str:
    """How it came out, on one line."""
    parts = []
    if not dry_run:
        amount = f" ({size_text(summary.nar_bytes)}, {size_text(summary.sent_bytes)} sent)" if summary.uploaded else ""
        parts.append(f"{summary.uploaded} pushed{amount}")
    parts.append(f"{summary.present} already there")
    if summary.upstream:
        parts.append(f"{summary.upstream} left to upstream caches")
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    return f"{amounts.count(summary.paths, 'path')} in {summary.seconds:.1f} s: {', '.join(parts)}"


def size_text(size: float) -> str:
    """Bytes as people read them."""
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"
