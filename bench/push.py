"""How fast do paths get into a cache? `cachesrv push` beside `nix copy` into a folder, and to our own server.

    python -m bench.push [--rows closure present large small start hook limit] [--scale 0.1]

`closure`: 1,000 paths, 1 GiB of files of this machine; `present`: the same, all of it there; `large`: one file of
2 GiB; `small`: 5,000 paths of 1 KiB; `start`: one small path that is there; `hook`: for one path; `limit`: how near the
pipeline comes to nothing but sha256 and zstd of the same bytes on all cores, and what these and the server's share, to
unpack and hash them again, take together. `--scale` makes the first four smaller.

Each measurement begins with a cache that is empty (or has everything) and a server of its own on all cores, and takes
the whole command. CPU is that of the command and of the server. Nix's client caches are empty, as is our record of what
was pushed: a warm one would answer without asking anybody. What is `there` was brought by somebody else, so to say.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench import common, stores
from bench.common import Peer
from cachesrv.cli import COMMANDS
from cachesrv.nix.compression import decompressed
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar_writer import NarDump, dump
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.seekable import compress_frame, cut
from cachesrv.nix.store_path import StorePath
from cachesrv.push.frame import FRAME_SIZE
from cachesrv.push.nar_source import LocalNar
from cachesrv.push.pipeline import Pipeline
from tests.system.server import CACHESRV, Server

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from bench.stores import Store

ROWS = ("closure", "present", "large", "small", "start", "hook", "limit")
COLUMNS = ("question", "by", "median", "ratio", "spread", "CPU", "peak memory")
COMPRESSION = "compression=zstd&parallel-compression=true"
AIMS = {"closure": 0.6, "present": 0.1, "large": 0.8, "small": 0.3, "start": 5, "hook": 3}


@dataclass(frozen=True)
class Taken:
    """Seconds on the clock and of all processors; MiB of the command at most."""

    seconds: float
    processor: float
    peak: float


class Way(Protocol):
    """A way to fill a cache; `there`: whether it is to have everything already."""

    name: str

    def measure(self, store: Store, *, there: bool) -> Taken: ...


class ByPush:
    """`cachesrv push` to a new server."""

    name = "cachesrv push"

    def __init__(self, folder: Path) -> None:
        self._servers = _Servers(folder)

    def measure(self, store: Store, *, there: bool) -> Taken:
        with self._servers.fresh() as server:
            options = ["--to", server.main, "--token-file", str(server.token_file), "--store", store.nix.store]
            command = [*CACHESRV, "push", *options, *store.paths]
            store.nix.environment["XDG_STATE_HOME"] = str(server.folder / "state")
            if there:
                run(store, command)
            return run(store, command, server)


class ByCopy:
    """`nix copy` to a new server of ours."""

    name = "nix copy --to http://"

    def __init__(self, folder: Path) -> None:
        self._servers = _Servers(folder)

    def measure(self, store: Store, *, there: bool) -> Taken:
        with self._servers.fresh() as server:
            store.nix.log_in(server.token)
            store.nix.forget()
            command = ["nix", "copy", "--to", f"{server.main}?{COMPRESSION}", *store.paths]
            if there:
                run(store, command)
                store.nix.forget()
            return run(store, command, server)


class ByFile:
    """`nix copy` into a new folder."""

    name = "nix copy --to file://"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()

    def measure(self, store: Store, *, there: bool) -> Taken:
        store.nix.forget()
        target = self._folder / f"copied-{next(self._numbers)}"
        command = ["nix", "copy", "--to", f"file://{target}?{COMPRESSION}", *store.paths]
        if there:
            run(store, command)
        return run(store, command)


class _Servers:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()

    @contextmanager
    def fresh(self) -> Iterator[Server]:
        folder = self._folder / f"server-{next(self._numbers)}"
        server = Server(folder)
        try:
            yield server.start()
        finally:
            server.dispose()


def run(store: Store, command: Sequence[str], server: Server | None = None) -> Taken:
    """A command that has to succeed."""
    peer = Peer("", "", [server.process.pid] if server else [])
    os.sync()
    before = peer.processor()
    started = time.monotonic()
    with (store.nix.folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=store.nix.environment, cwd=store.nix.folder, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{(store.nix.folder / 'log').read_text()[-2000:]}")
    processor = used.ru_utime + used.ru_stime + peer.processor() - before
    return Taken(seconds, processor, used.ru_maxrss / 1024)


def ask(question: str, rounds: int, ways: dict[str, Callable[[], Taken]]) -> list[tuple[str, ...]]:
    """Measure all ways by turns, each time in another order; the rows, with ratios of the first way to each other."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            taken[name].append(ways[name]())
            last = taken[name][-1]
            print(
                f"  {question}, {number + 1}/{rounds}, {name}: {last.seconds:.3f} s, {last.processor:.3f} s of CPU",
                file=sys.stderr,
            )
    return [_row(question, names[0], name, taken) for name in names]


def _row(question: str, ours: str, name: str, taken: dict[str, list[Taken]]) -> tuple[str, ...]:
    ratio = spread = ""
    if name != ours:
        ratios = [our.seconds / their.seconds for our, their in zip(taken[ours], taken[name], strict=True)]
        ratio, spread = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"
    elif question in AIMS:
        spread = f"aim: {AIMS[question]}"
    return (
        question if name == ours else "",
        name,
        f"{statistics.median(one.seconds for one in taken[name]):.3f} s",
        ratio,
        spread,
        f"{statistics.median(one.processor for one in taken[name]):.2f} s",
        f"{max(one.peak for one in taken[name]):.0f} MiB",
    )


def fill(options: argparse.Namespace, question: str, store: Store, *, there: bool = False) -> list[tuple[str, ...]]:
    """A row of those that fill a cache."""
    with filled(options) as folder:
        ways = [way(folder / way.__name__) for way in (ByPush, ByFile, ByCopy) if way.name not in options.without]
        return ask(question, options.rounds, {way.name: _measuring(way, store, there=there) for way in ways})


@contextmanager
def filled(options: argparse.Namespace) -> Iterator[Path]:
    """Where caches are made, which go when all is measured: ext4 takes its time over inodes that have just been freed,
    and whoever comes next would pay for it.
    """
    with tempfile.TemporaryDirectory(prefix="filled-", dir=options.data) as folder:
        yield Path(folder)


def _measuring(way: Way, store: Store, *, there: bool) -> Callable[[], Taken]:
    return lambda: way.measure(store, there=there)


def start(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """One small path that is there."""
    store = stores.small(options.data, 1)
    with filled(options) as folder, _Servers(folder).fresh() as server:
        to = ["--to", server.main, "--token-file", str(server.token_file), "--store", store.nix.store]
        command = [*CACHESRV, "push", *to, *store.paths]
        run(store, command)
        bare = [sys.executable, "-c", "import asyncio"]
        ways = {"cachesrv push": lambda: run(store, command, server), "import asyncio": lambda: run(store, bare)}
        return ask("start", 3 * options.rounds, ways)


def hook(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """What a build waits for after each derivation."""
    if "hook" not in COMMANDS:
        return []
    store = stores.small(options.data, 1)
    queue = str(store.nix.folder / "queue")  # not that of this machine, which would be pushed
    store.nix.environment |= {"OUT_PATHS": " ".join(store.paths), "DRV_PATH": "", "CACHESRV_QUEUE_DIR": queue}
    bare = [sys.executable, "-c", "pass"]
    ways = {"cachesrv hook": lambda: run(store, [*CACHESRV, "hook"]), "pass": lambda: run(store, bare)}
    return ask("hook", 3 * options.rounds, ways)


def limit(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """The pipeline, and nothing but its arithmetic on pieces that lie in memory."""
    store = stores.large(options.data, round(stores.GIB // 2 * options.scale))
    file = store.nix.root / Path(store.paths[0]).name
    pieces = list(cut(dump(file), FRAME_SIZE))
    path = StorePath.parse(file.name)
    info = PathInfo(path, _digest(pieces), sum(map(len, pieces)))
    ways = {"pipeline": lambda: _timed(lambda: asyncio.run(_through(file, info)))}
    ways["sha256 and zstd"] = lambda: _timed(lambda: _bare(pieces, _sent))
    ways["both ends"] = lambda: _timed(lambda: _bare(pieces, _sent_and_verified))
    return ask("limit", options.rounds, ways)


def _digest(pieces: Sequence[bytearray]) -> Hash:
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    return Hash("sha256", digest.digest())


async def _through(file: Path, info: PathInfo) -> None:
    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(NarDump(file)), info) as nar:
            async for _ in nar:
                pass


def _sent(piece: bytearray) -> bytes:
    sha256(piece).digest()
    return compress_frame(piece)


def _sent_and_verified(piece: bytearray) -> None:
    frame = _sent(piece)
    sha256(frame).digest()
    for part in decompressed("zstd", (frame,)):
        sha256(part).digest()


def _bare(pieces: Sequence[bytearray], work: Callable[[bytearray], object]) -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(work, pieces))


def _timed(call: Callable[[], None]) -> Taken:
    started, used = time.monotonic(), time.process_time()
    call()
    return Taken(time.monotonic() - started, time.process_time() - used, 0)


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which to measure")
    parser.add_argument("--scale", type=float, default=1.0, help="of numbers and sizes")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="ways that are not measured")
    options = parser.parse_args()
    print(common.machine(), end="\n\n")
    scale, data = options.scale, options.data / "push"
    options.data = data
    data.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, ...]] = []
    for row in options.rows:
        match row:
            case "closure" | "present":
                store = stores.closure(data, round(1000 * scale), round(stores.GIB * scale))
                found += fill(options, row, store, there=row == "present")
            case "large":
                found += fill(options, row, stores.large(data, round(2 * stores.GIB * scale)))
            case "small":
                found += fill(options, row, stores.small(data, round(5000 * scale)))
            case "start":
                found += start(options)
            case "hook":
                found += hook(options)
            case "limit":
                found += limit(options)
    print(common.table(COLUMNS, found, markdown=options.markdown))


if __name__ == "__main__":
    main()
