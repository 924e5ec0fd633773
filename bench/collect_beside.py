"""What lookups lose while garbage is collected: `python bench/collect_beside.py --data /var/tmp/bench`.

The later half of the paths goes, by the process that the server would start, on the server's core; the other half is
asked for, once with the server left alone and once meanwhile, on a copy of the data for each round.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import common
import data
from common import Answers, Keys, Question, Run

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from common import Peer
    from data import Data

ALONE, BESIDE = "alone", "beside a collection"
_CONFIG = '[collect]\ninterval = 1\n[[cache]]\nname = "main"\nroot = true\nretention_age = "1 d"\n'
_BEGINNING = 2.0
"""Seconds after which the collector has something to do."""


@contextmanager
def copied(cache: Data) -> Iterator[Data]:
    """The data once more, in which the earlier half of the paths was used lately. Paths refer to those before them."""
    with tempfile.TemporaryDirectory(dir=cache.folder.parent, prefix="collect-") as name:
        copy = type(cache)(Path(name) / "data", cache.number)
        shutil.copytree(cache.folder, copy.folder, ignore=shutil.ignore_patterns("objects", "log"))
        parts = sorted(cache.keys(cache.present, cache.number))
        kept = parts[: len(parts) // 2]
        (copy.folder / "kept.keys").write_text("".join(kept))
        with closing(sqlite3.connect(copy.folder / "catalog.sqlite")) as catalog, catalog:
            catalog.execute("UPDATE paths SET registered_at = 1, last_used_at = NULL")
            used = (int(time.time()), kept[-1])
            catalog.execute("UPDATE paths SET last_used_at = ? WHERE cache = 'main' AND hash_part <= ?", used)
        (copy.folder / "gc.toml").write_text(_CONFIG)
        os.sync()
        yield copy


def hits(peer: Peer, cache: Data, options: Namespace) -> Run:
    keys = [Keys(cache.folder / "kept.keys")]
    load = {"connections": options.connections, "seconds": options.seconds, "suffix": "/*.narinfo", "keys": keys}
    return common.load(peer, options.load_core, **load)


def both(cache: Data, options: Namespace) -> tuple[Run, Run]:
    """Alone, and beside a collection, which lasts as long."""
    with copied(cache) as copy, common.cachesrv(copy, options.server_core) as peer:
        alone = hits(peer, copy, options)
        command = [sys.executable, "-m", "cachesrv", "gc", "--scheduled", "--data-dir", str(copy.folder)]
        command += ["--config", str(copy.folder / "gc.toml")]
        collector = subprocess.Popen(["taskset", "-c", options.server_core, *command], cwd=common.ROOT)
        try:
            time.sleep(_BEGINNING)
            beside = hits(peer, copy, options)
            if collector.poll() is not None:
                raise SystemExit("the collection was over too soon: take more --paths, or fewer --seconds")
        finally:
            collector.kill()
            collector.wait()
    return alone, beside


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--paths", type=int, default=200_000, help="how many there are")
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    print(common.machine(), end="\n\n")
    cache = data.paths(options.data, options.paths, files=False)
    runs: dict[str, list[Run]] = {ALONE: [], BESIDE: []}
    for _ in range(options.rounds):
        for name, run in zip((ALONE, BESIDE), both(cache, options), strict=True):
            runs[name].append(run)
    answers = Answers(Question("hits", lambda _: runs[ALONE][0]), runs)
    found = list(common.rows(answers, of=BESIDE))
    print(common.table(common.COLUMNS, found, markdown=options.markdown))


if __name__ == "__main__":
    main()
