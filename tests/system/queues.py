"""`cachesrv queue` of a machine as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cachesrv.push.queue.status import Status, read_status
from tests.system.server import CACHESRV, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.system.nix import Nix
    from tests.system.server import Server

PATIENCE = 60.0


class Queue:
    """The queue of a machine, pushed to the cache `main` of a server."""

    def __init__(self, nix: Nix, server: Server) -> None:
        self.directory = nix.folder / "queue"
        self.environment = nix.environment | {"CACHESRV_DEBUG": "1", "CACHESRV_QUEUE_DIR": str(self.directory)}
        self._nix = nix
        self._way = ["--to", server.main, "--token-file", str(server.token_file), "--store", nix.store]
        self._logs = 0

    def install_hook(self) -> None:
        """As a program of its own, with what nix.conf has to say of it."""
        script = self._nix.folder / "hook"
        # A hook has what the daemon has of an environment, which is next to nothing.
        script.write_text(
            "#!/bin/sh\n"
            f"exec env -i PYTHONPATH='{self.environment.get('PYTHONPATH', '')}' OUT_PATHS=\"$OUT_PATHS\" "
            f"DRV_PATH=\"$DRV_PATH\" '{sys.executable}' -m cachesrv hook --queue '{self.directory}'\n"
        )
        script.chmod(0o755)
        self._nix.configure(post_build_hook=str(script))

    def says(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What `cachesrv queue …` does and says."""
        return subprocess.run(
            [*CACHESRV, "queue", *arguments],
            check=False,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def command(self, name: str, *arguments: str) -> list[str]:
        """A command that pushes from the machine to the server."""
        return [*CACHESRV, *name.split(), *self._way, *arguments]

    def drains(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command("queue drain"),
            check=False,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    @property
    def status(self) -> Status:
        return read_status(str(self.directory))

    def is_pushed_by(self, service: Runs | None) -> bool:
        return self.status.process == (service.process.pid if service else None)

    def is_empty(self) -> bool:
        status = self.status
        return (status.waiting, status.in_flight, status.failed) == (0, 0, 0)

    @contextmanager
    def runs(
        self, *options: str, name: str = "queue run", by: tuple[str, ...] = (), **variables: str
    ) -> Iterator[Runs]:
        """A service, killed at the end if it still runs; `by` is a command that starts it, with more variables."""
        self._logs += 1
        log = self._nix.folder / f"queue-{self._logs}.log"
        with log.open("wb") as stream:
            command = [*by, *self.command(name, *options)]
            process = subprocess.Popen(command, env=self.environment | variables, stdout=stream, stderr=stream)
        try:
            yield Runs(process, log)
        finally:
            process.kill()
            process.wait(PATIENCE)
        assert "Traceback" not in log.read_text(), log.read_text()


def published(server: Server) -> set[str]:
    """The store paths in its caches."""
    rows = server.query("select n.hash_part || '-' || n.name from paths p join names n on n.id = p.id")
    return {f"/nix/store/{name}" for (name,) in rows}


class Runs:
    """A service and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it has logged, but for a line that is being written."""
        lines = self._log.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in lines]

    def told(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == event]

    def until_told(self, event: str) -> None:
        until(lambda: bool(self.told(event)), f"it does not say “{event}”: {self._log.read_text()}")
