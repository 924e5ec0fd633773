"""Events of a push as bars on a terminal: one for the whole, one for each NAR on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from cachesrv.push.events import Event, Failed, Noted, PlanMade, Published, Retrying, Sending, Sent, Stored, Summary
from cachesrv.push.progress import summary_text, trouble_text
from cachesrv.services import amounts

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

_LEAST_SIZE = 4 * 1024 * 1024
"""Bytes from which a NAR has a bar of its own: others would only flicker."""

_NAME_WIDTH = 32


class Bars:
    """Bars on `err`, which is a terminal; troubles above them; the summary on `out`."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=err),
            transient=True,
        )
        self._whole = self._progress.add_task("asking", total=None)
        self._bars: dict[str, TaskID] = {}
        self._sent: dict[str, int] = {}
        self._to_publish = 0
        self._published = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case PlanMade():
                self._to_publish = event.upload + event.publish
                self._progress.update(self._whole, total=event.nar_bytes)
                self._describe()
            case Sending():
                self._begin(event)
            case Sent():
                self._advance(event.path, event.nar_bytes)
            case Stored():
                self._advance(event.path, event.nar_size - self._sent.get(event.path, 0))
                self._remove_bar(event.path)
            case Published():
                self._published += 1
                self._describe()
            case Failed() | Retrying() | Noted():
                self._tell(event)
            case Summary():
                self._progress.stop()
                self._out.write(summary_text(event) + "\n")
                self._out.flush()

    def _describe(self) -> None:
        done = f"{self._published} of {amounts.count(self._to_publish, 'path')}"
        self._progress.update(self._whole, description=done)

    def _begin(self, event: Sending) -> None:
        """A NAR that begins again has sent nothing yet."""
        self._advance(event.path, -self._sent.get(event.path, 0))
        self._remove_bar(event.path)
        if event.nar_size >= _LEAST_SIZE:
            name = event.path.partition("-")[2]
            shown = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"
            self._bars[event.path] = self._progress.add_task(shown, total=event.nar_size)

    def _advance(self, path: str, nar_bytes: int) -> None:
        self._sent[path] = self._sent.get(path, 0) + nar_bytes
        self._progress.advance(self._whole, nar_bytes)
        if path in self._bars:
            self._progress.advance(self._bars[path], nar_bytes)

    def _remove_bar(self, path: str) -> None:
        bar = self._bars.pop(path, None)
        if bar is not None:
            self._progress.remove_task(bar)

    def _tell(self, event: Failed | Retrying | Noted) -> None:
        if isinstance(event, Failed):
            self._remove_bar(event.path)
        self._progress.console.print(Text(trouble_text(event)), soft_wrap=True)
