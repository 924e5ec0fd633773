"""Does any client ever see a hole while garbage is collected? `python -m bench.soak --minutes 30 [--s3]`

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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bench.soak_clients import Asker, Client, Downloader, Pusher, Terms, World
from tests.radosgw import shared_gateway
from tests.system.server import Server
from tests.system.stored import Bucket

if TYPE_CHECKING:
    from collections import Counter

    from tests.system.stored import Stored

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
    """On a server of its own, below `folder`, that keeps its objects there or where they are `stored`."""

    def __init__(self, folder: Path, seed: int, stored: Stored | None = None) -> None:
        self.server = Server(folder, config=_CONFIG, stored=stored)
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
        command = self.server.command("gc", "--json")
        with (self.server.folder / "gc").open("wb+") as output:
            collector = subprocess.Popen(command, env=self.server.environment, stdout=output)
            try:
                patience = self._chance.uniform(0, 0.5) if self._chance.random() < 0.5 else None
                while patience is not None and collector.poll() is None and not self._is_at_it(collector.pid):
                    time.sleep(0.01)
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

    def _is_at_it(self, pid: int) -> bool:
        """Whether this process is collecting by now."""
        return bool(self.server.query("select 1 from locks where holder like ?", f"process {pid} on %"))

    def _check(self, world: World) -> None:
        """All that is published is whole in storage."""
        command = self.server.command("verify", "--json")
        done = subprocess.run(command, check=False, env=self.server.environment, capture_output=True, text=True)
        *flaws, _ = [*done.stdout.splitlines(), ""]
        if done.returncode:
            world.violations += flaws or [f"the verification ended with {done.returncode}: {done.stderr}"]


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--s3", action="store_true", help="keep objects in a bucket of Ceph's gateway")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cachesrv-soak-")))
        stored = None
        if options.s3:
            gateway = stack.enter_context(shared_gateway(folder / "gateway"))
            stored = Bucket(gateway, gateway.make_bucket(), "soak", folder, mode="proxy")
        world = Soak(folder, options.seed, stored).run(options.minutes * 60)
    print(*lines(world.counts), sep="\n")
    print(*world.violations or ["no client saw anything wrong"], sep="\n")
    return 1 if world.violations else 0


if __name__ == "__main__":
    sys.exit(main())
