"""How fast and in how much memory is a cache reindexed?

    python -m bench.reindex [--data FOLDER] [--paths 100000] [--rounds 3]

Narinfos of the size and form of those of nixpkgs, each with a NAR (a hole of its size), lie in a folder; they are made
once. `cachesrv reindex` takes them into a new catalog and a new index, on one core, and then once more. Printed are
paths a second by the clock and by processor time, and the most memory of its own that the process held (RssAnon,
proc(5)); pages of mapped files, which the system takes back when it wants to, are not among it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.data import CACHE, hash_part, narinfo_at
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey

MIB = 2**20
DERIVED = ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "index", "reindex")


@dataclass(frozen=True)
class Run:
    paths: int
    seconds: float
    processor: float
    memory: int


def make(folder: Path, number: int) -> None:
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    objects = folder / "objects" / CACHE
    (objects / "nar").mkdir(parents=True)
    key = SecretKey.generate("main-1")
    parts = sorted(hash_part("path", place) for place in range(number))
    for place in range(number):
        info = narinfo_at(parts, place, key)
        (objects / f"{info.store_path.hash_part}.narinfo").write_bytes(narinfo.render(info))
        nar = os.open(objects / info.url, os.O_CREAT | os.O_WRONLY)
        os.ftruncate(nar, info.file_size or 0)
        os.close(nar)
    os.sync()
    (folder / "done").touch()


def reindex(folder: Path, core: str) -> Run:
    command = [sys.executable, "-m", "cachesrv", "reindex", "--data-dir", str(folder), "--json"]
    begun, before, memory = time.monotonic(), os.times(), 0
    with subprocess.Popen(["taskset", "-c", core, *command], stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            memory = max(memory, own_memory(process.pid))
            time.sleep(0.05)
        assert process.stdout
        summary = json.loads(process.stdout.read().splitlines()[-1])
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(summary["paths"], time.monotonic() - begun, processor, memory)


def own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def say(title: str, runs: list[Run]) -> None:
    rate = statistics.median(run.paths / run.seconds for run in runs)
    by_processor = statistics.median(run.paths / run.processor for run in runs)
    memory = max(run.memory for run in runs) / MIB
    print(
        f"{runs[0].paths:>9,} paths, {title:14} {rate:7,.0f} paths/s, {by_processor:7,.0f} by processor time,"
        f" {memory:4.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "cachesrv-bench")
    parser.add_argument("--paths", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", default="0")
    options = parser.parse_args()
    for number in options.paths:
        folder = options.data / f"reindex-{number}"
        make(folder, number)
        anew, again = [], []
        for _ in range(options.rounds):
            for name in DERIVED:
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / name).unlink(missing_ok=True)
            anew.append(reindex(folder, options.core))
            again.append(reindex(folder, options.core))
        say("all is new", anew)
        say("all is known", again)


if __name__ == "__main__":
    main()
