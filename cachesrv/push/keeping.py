"""What a push keeps of what it sends, from the one pass that it makes: the record, and NARs for Nix."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cachesrv.push.events import Noted
from cachesrv.push.kept_nars import KeptNars
from cachesrv.push.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.events import Emit
    from cachesrv.push.inspection import Tap


class Keeping:
    """`emit` is the one to be used for what happens to paths that are kept track of."""

    def __init__(self, recorder: Recorder | None, kept: KeptNars | None, emit: Emit) -> None:
        self.emit: Emit = emit if recorder is None else recorder
        self._keepers = [keeper for keeper in (recorder, kept) if keeper is not None]

    def expect(self, infos: Sequence[PathInfo]) -> None:
        """Paths that may be published."""
        for keeper in self._keepers:
            keeper.expect(infos)

    def taps(self, info: PathInfo) -> Sequence[Tap]:
        """Those who look on while the NAR of a path is read."""
        return [keeper.tap(info) for keeper in self._keepers]


@asynccontextmanager
async def keeping(
    record: Path | None, keep_nars: Path | None, cache: str, store_dir: str, emit: Emit
) -> AsyncIterator[Keeping]:
    """`record`: a file; `keep_nars`: a directory; `cache`: its URL. What goes wrong is told when this ends."""
    recorder = None if record is None else Recorder(record, cache, store_dir, emit)
    kept = None if keep_nars is None else KeptNars(keep_nars)
    try:
        yield Keeping(recorder, kept, emit)
    finally:
        if recorder is not None:
            await recorder.close()
        if kept is not None and kept.trouble is not None:
            emit(Noted(kept.trouble))
