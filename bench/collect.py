"""How long it takes to decide what may go: `python -m bench.collect [--paths 1000000]`.

Makes a catalog of that size (in /var/tmp, some minutes; it is kept and used again) and marks it by age and by size, on
one core.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.catalog.sql import SqlCatalog
from cachesrv.services.marking import Marking, Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 1_800_000_000
YEAR = 365 * 86_400
POPULAR = 1_000
FILE_SIZE = 100_000


async def make(file: Path, paths: int, references: int) -> None:
    await (await SqlCatalog.open(f"sqlite:///{file}")).close()
    chance = random.Random(6)
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.executemany("INSERT INTO names VALUES (?, 'main', ?, 'package')", names(paths))
        connection.executemany(
            "INSERT INTO paths VALUES (?, 'main', ?, ?, ?, 400000, ?, NULL, NULL, ?, ?, NULL, NULL)",
            (
                (n, f"{n:032d}", f"main/nar/{n:052d}.nar.zst", f"sha256:{n:052d}", FILE_SIZE, NOW - YEAR, used(chance))
                for n in range(1, paths + 1)
            ),
        )
        connection.executemany("INSERT OR IGNORE INTO refs VALUES (?, ?)", edges(chance, paths, references))
    connection.close()


def names(paths: int) -> Iterator[tuple[int, str]]:
    return ((n, f"{n:032d}") for n in range(1, paths + 1))


def used(chance: random.Random) -> int:
    return NOW - int(YEAR * chance.random() ** 2)


def edges(chance: random.Random, paths: int, references: int) -> Iterator[tuple[int, int]]:
    """Each path refers to a few that everybody refers to, and else to what was pushed not long before it."""
    for path in range(2, paths + 1):
        popular = {chance.randrange(1, min(path, POPULAR)) if path > 2 else 1 for _ in range(references // 3)}
        lately = {max(1, path - 1 - int(chance.expovariate(1 / 5_000))) for _ in range(references - len(popular))}
        for reference in sorted(popular | lately):
            yield path, reference


async def measure(file: Path) -> None:
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    count, _ = await catalog.count("main")
    for title, policy in (
        ("by age, 90 days", Policy(90 * 86_400, None, 0)),
        ("by age, 1 day", Policy(86_400, None, 0)),
        ("by size, half of it", Policy(None, count * FILE_SIZE // 2, 0)),
        ("by size, a tenth of it", Policy(None, count * FILE_SIZE // 10, 0)),
        ("by size, all fits", Policy(None, count * FILE_SIZE, 0)),
    ):
        started, worked = time.monotonic(), time.process_time()
        plan = await Marking(catalog, "main").plan(policy, NOW)
        seconds, work = time.monotonic() - started, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{title:24} {plan.count:8} of {count} paths go; {seconds:6.1f} s, {work:6.1f} s of CPU, {peak} MiB peak")
    await catalog.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=1_000_000)
    parser.add_argument("--references", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    file = options.folder / f"cachesrv-collect-{options.paths}-{options.references}.sqlite"
    if not file.exists():
        asyncio.run(make(file, options.paths, options.references))
    asyncio.run(measure(file))


if __name__ == "__main__":
    main()
