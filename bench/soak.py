"""Does any client ever see a hole while garbage is collected? `python -m bench.soak --minutes 30`

Pushes, downloads, lookups and collections go on at once, on a cache that keeps paths for seconds; half of the
collectors are killed with SIGKILL. A path without one of its references, a NAR that is missing or not whole, a push
that cannot rely on what it was told, an acknowledged path that is not there: each ends the soak and is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.soak_clients import Asker, Client, Downloader, Pusher, Terms, World
from tests.system.server import CACHESRV, Server

if TYPE_CHECKING:
    from collections import Counter

TERMS = Terms(lease=4, grace=5)
_CONFIG = f"""
[server]
workers = 2
[collect]
interval = 0
lease = {TERMS.lease}
nar_grace = {TERMS.grace}
[[cache]]
name = "main"
retention_age = 1
"""
CLIENTS: tuple[type[Client], ...] = (Pusher, Pusher, Pusher, Downloader, Downloader, Downloader, Asker)


class Soak:
    """On a server of its own, below `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.server = Server(folder, config=_CONFIG)
        self._chance = random.Random(seed)

    def run(self, seconds: float) -> World:
        """Go on for so long, or until something is wrong."""
        self.server.start()
        try:
            world = World(self.server.url, self.server.token, TERMS)
            clients = [kind(world, self._chance.getrandbits(32)) for kind in CLIENTS]
            for client in clients:
                client.start()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not world.stop.is_set():
                self._collect(world)
            world.stop.set()
            for client in clients:
                client.join()
            self._check(world)
        finally:
            self.server.dispose()
        return world

    def _collect(self, world: World) -> None:
        """A collection that is killed in every other case, wherever it is then."""
        command = [*CACHESRV, "gc", "--json", "--data-dir", str(self.server.data_dir)]
        command += ["--config", str(self.server.config_file)]
        with (self.server.folder / "gc").open("wb+") as output:
            collector = subprocess.Popen(command, env=self.server.environment, stdout=output)
            try:
                patience = self._chance.uniform(0.3, 1.5) if self._chance.random() < 0.5 else None
                status = collector.wait(patience)
            except subprocess.TimeoutExpired:
                collector.kill()
                status = collector.wait()
            output.seek(0)
            for event in filter(None, map(_event, output)):
                world.counts[f"collected: {event}"] += 1
        world.counts["collections" if status == 0 else "collectors killed"] += 1
        if status > 0:
            world.violations.append(f"a collector ended with {status}")

    def _check(self, world: World) -> None:
        """All that is published is whole in the folder."""
        published = dict(self.server.query("select nar_key, file_size from paths"))
        for key, size in published.items():
            file = self.server.data_dir / "objects" / key
            if not file.exists() or file.stat().st_size != size:
                world.violations.append(f"{key} is not whole")
        holes = self.server.query(
            "select names.name from refs join names on names.id = name_id"
            " where name_id not in (select id from paths) limit 1"
        )
        world.violations += [f"{name} is published no more, and needed" for (name,) in holes]


def _event(line: bytes) -> str | None:
    """What went; None for the sums, and for a line that was cut short."""
    try:
        event: str = json.loads(line)["event"]
    except ValueError:
        return None
    return event if event != "summary" else None


def lines(counts: Counter[str]) -> list[str]:
    return [f"{number:10}  {what}" for what, number in sorted(counts.items())]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="cachesrv-soak-") as folder:
        world = Soak(Path(folder), options.seed).run(options.minutes * 60)
    print(*lines(world.counts), sep="\n")
    print(*world.violations or ["no client saw anything wrong"], sep="\n")
    return 1 if world.violations else 0


if __name__ == "__main__":
    sys.exit(main())
