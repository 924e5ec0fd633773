"""From the start of a server to its first answer, and what it holds in memory, by the number of paths."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING

import common
import data
from common import Keys

if TYPE_CHECKING:
    import argparse

    from data import Data

INDEX_FILE = "/data.mdb"
COLUMNS = ("paths", "first answer", "with cold files", "memory at the start", "after lookups", "index")


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--paths", type=int, nargs="+", default=[10_000, 1_000_000], help="how many there are")
    options = parser.parse_args()
    print(common.machine(), end="\n\n")
    found = [row(options, number) for number in options.paths]
    print(common.table(COLUMNS, found, markdown=options.markdown), end="\n\n")
    print("Memory: resident MiB of the process beyond the mapped index; in front of lookups, and after some thousands.")


def row(options: argparse.Namespace, number: int) -> tuple[str, ...]:
    cache = data.paths(options.data, number, files=False)
    warm = [first_answer(options, cache) for _ in range(options.rounds)]
    cold = [first_answer(options, cache, cold=True) for _ in range(options.rounds)]
    with common.cachesrv(cache, options.server_core) as peer:
        (pid,) = peer.processes
        before = common.resident_beyond(pid, INDEX_FILE)
        common.load(
            peer,
            options.load_core,
            connections=32,
            seconds=2 * options.seconds,
            suffix="/*.narinfo",
            keys=[Keys(cache.present)],
        )
        after = common.resident_beyond(pid, INDEX_FILE)
    size = (cache.folder / "index" / "data.mdb").stat().st_blocks * 512 / common.MIB
    return (
        f"{number:,}",
        f"{statistics.median(warm):.2f} s",
        f"{statistics.median(cold):.2f} s",
        f"{before:.0f} MiB",
        f"{after:.0f} MiB",
        f"{size:,.0f} MiB",
    )


def first_answer(options: argparse.Namespace, cache: Data, *, cold: bool = False) -> float:
    """Seconds; `cold`: its files are on disk only."""
    if cold:
        for file in cache.folder.rglob("*.mdb"), cache.folder.glob("catalog.sqlite*"):
            for path in file:
                chill(str(path))
    (key,) = cache.keys(cache.present, 1)
    begun = time.monotonic()
    with common.cachesrv(cache, options.server_core) as peer:
        status, _ = common.fetch(peer.url, f"/{key}.narinfo")
        taken = time.monotonic() - begun
    assert status == 200
    return taken


def chill(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
