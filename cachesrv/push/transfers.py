"""The journal as a push uses it: from its event loop, holding nothing up. Trouble with it is never a reason to fail: it
is told of, once, and the push goes on without.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.push.arrived import Transfer
from cachesrv.push.events import Noted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from cachesrv.nix.hashes import Hash
    from cachesrv.push.arrived import ArrivedPart
    from cachesrv.push.events import Emit
    from cachesrv.push.journal import Journal


class Transfers:
    """Those of one push to the cache at a URL, which has `there` (NAR hashes as `sha256:<nix32>`) already. There is no
    journal without a `file`, and it is not touched before a NAR goes in parts.
    """

    def __init__(self, file: Path | None, cache: str, there: Iterable[str], emit: Emit) -> None:
        self._file = file
        self._cache = cache
        self._there = there
        self._emit = emit
        self._thread = ThreadPoolExecutor(1, "cachesrv-journal")
        self._journal: Journal | None = None
        self._trouble: StoreError | None = None
        self._known: defaultdict[str, set[Transfer]] = defaultdict(set)

    async def begun(self, nar_hash: Hash) -> Sequence[tuple[Transfer, Sequence[ArrivedPart]]]:
        """The transfers of this NAR that were not finished, the latest first, and what had arrived of them."""
        if self._file is None:
            return []
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._read, nar_hash.nix32)
        self._known[nar_hash.nix32].update(transfer for transfer, _ in found)
        return found

    def transfer(self, nar_hash: Hash, upload: str, level: int) -> Transfer:
        """One that begins, or goes on."""
        return Transfer(self._cache, nar_hash.nix32, upload, level)

    async def begin(self, transfer: Transfer) -> None:
        """Parts are about to be sent: they may arrive without our hearing of it."""
        self._known[transfer.nar_hash].add(transfer)
        if self._file is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._with, lambda journal: journal.begin(transfer))

    def arrived(self, transfer: Transfer, part: ArrivedPart) -> None:
        """The server has this part."""
        if self._file is not None:
            self._thread.submit(self._with, lambda journal: journal.add(transfer, part))

    def forget(self, transfer: Transfer) -> None:
        """Nobody can go on with this one."""
        self._known[transfer.nar_hash].discard(transfer)
        if self._file is not None:
            self._thread.submit(self._with, lambda journal: journal.forget([transfer]))

    def over(self, nar_hash: Hash) -> Sequence[Transfer]:
        """The NAR is at the server: the transfers that have come to their end."""
        known = list(self._known.pop(nar_hash.nix32, ()))
        if known and self._file is not None:
            self._thread.submit(self._with, lambda journal: journal.forget(known))
        return known

    async def close(self) -> None:
        """All is written, or it was told why not."""
        await asyncio.to_thread(self._end)
        if self._trouble is not None:
            self._emit(Noted(str(self._trouble)))

    def _read(self, nar_hash: str) -> Sequence[tuple[Transfer, Sequence[ArrivedPart]]]:
        found: list[tuple[Transfer, Sequence[ArrivedPart]]] = []

        def read(journal: Journal) -> None:
            transfers = journal.transfers(self._cache, nar_hash)
            found.extend([(transfer, journal.parts(transfer)) for transfer in transfers])

        self._with(read)
        return found

    def _with(self, work: Callable[[Journal], object]) -> None:
        """In the one thread that has the journal."""
        from cachesrv.push.journal import Journal  # noqa: PLC0415  brings SQLite with it

        if self._trouble is not None or self._file is None:
            return
        try:
            if self._journal is None:
                self._journal = Journal.open(self._file)
            work(self._journal)
        except StoreError as error:
            self._trouble = error

    def _tidy(self, journal: Journal) -> None:
        """A server may have come to an end with a NAR after the push was interrupted."""
        begun = journal.begun(self._cache)
        for nar_hash in begun.intersection(self._there):
            journal.forget(journal.transfers(self._cache, nar_hash))
        journal.prune()

    def _end(self) -> None:
        self._thread.shutdown()
        if self._journal is not None:
            self._with(self._tidy)
            self._journal.close()


@asynccontextmanager
async def journalled(file: Path | None, cache: str, there: Iterable[str], emit: Emit) -> AsyncIterator[Transfers]:
    """The transfers of a push, see there; what goes wrong with the journal is told when this ends."""
    transfers = Transfers(file, cache, there, emit)
    try:
        yield transfers
    finally:
        await transfers.close()
