"""`cachesrv serve` as a process of its own, and what it leaves on disk."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.system.client import Client
from tests.system.stored import Folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.system.stored import Stored

CACHESRV = (sys.executable, "-m", "cachesrv")
PATIENCE = 60.0
"""Seconds after which a server is taken to hang."""

_ANSWERS_AT = re.compile(r"cachesrv answers at (\S+?)(?:,| for )")
_EVERYTHING = (
    "select cache, hash_part, nar_key, nar_hash, nar_size, file_size, content"
    " from paths join narinfos on path_id = id order by cache, hash_part"
)


class Server:
    """A server on a data directory below `folder`; `environment` is added to a bare one, `config` is TOML, and `stored`
    is where it keeps its objects, if not in that directory. It can be started again, with the same data and the same
    address, after it was ended in whatever way.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        config: str | None = None,
        listen: str = "127.0.0.1:0",
        data_dir: Path | None = None,
        stored: Stored | None = None,
    ) -> None:
        self.folder = folder
        self.data_dir = data_dir or folder / "data"
        self.stored = stored or Folder(self.data_dir / "objects")
        self.environment = inherited() | {"HOME": str(folder), "CACHESRV_DEBUG": "1"}
        # The usual reserves of so many servers would fill a disk indeed.
        self.environment |= {"CACHESRV_STORAGE__RESERVE": "1 MiB"}
        self.environment |= self.stored.settings | (environment or {})
        self.listen = listen
        self.config_file = folder / "cachesrv.toml"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            self.config_file.write_text(config)

    def start(self, **popen: Any) -> Server:
        """Returns when it answers; `popen` goes to subprocess.Popen."""
        command = self.command("serve", *(["--listen", self.listen] if self.listen else []))
        with (self.folder / "out").open("wb") as out, (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=log, **popen)
        self.url = self._greeted()
        if self.url.startswith("http://"):
            self.listen = self.url.removeprefix("http://") if self.listen else ""
            assert self.client().get("/health/ready").status == 200
        return self

    def command(self, name: str, *arguments: str) -> list[str]:
        """The words of a command on the same stores."""
        config = ["--config", str(self.config_file)] if self.config_file.exists() else []
        return [*CACHESRV, name, "--data-dir", str(self.told_data_dir), *config, *arguments]

    @property
    def told_data_dir(self) -> Path:
        """The data directory as commands see it."""
        return self.data_dir

    def _greeted(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while not (match := _ANSWERS_AT.search(self.greeting)):
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the server does not say where it answers:\n{self.greeting}{self.log}"
            time.sleep(0.02)
        return match[1]

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server was not started"
        return self._process

    @property
    def greeting(self) -> str:
        """What it has printed for people since it was started last."""
        return (self.folder / "out").read_text()

    @property
    def log(self) -> str:
        """What it has logged since it was started first."""
        file = self.folder / "log"
        return file.read_text() if file.exists() else ""

    @property
    def main(self) -> str:
        """The URL of the cache `main`."""
        return f"{self.url}/main"

    @property
    def objects(self) -> Path:
        """The folder that is itself the cache `main`, for a server that keeps its objects in files."""
        return self.data_dir / "objects" / "main"

    @property
    def token_file(self) -> Path:
        return self.data_dir / "push-token"

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    @property
    def public_key(self) -> str:
        return (self.data_dir / "keys" / "main.public").read_text().strip()

    def client(self, token: str | None = None) -> Client:
        """A client that sends this token, if any."""
        return Client(self.url, token)

    @property
    def pusher(self) -> Client:
        """A client that sends the push token."""
        return self.client(self.token)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it without a warning."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        self.signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def dispose(self) -> None:
        """End it if it still runs; nothing it said may be about a defect of its own."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        assert "Traceback" not in self.log, self.log
        assert '"defect"' not in self.log, self.log

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that it held at most (proc(5), VmHWM)."""
        return peak_memory(self.process.pid)

    @property
    def absences(self) -> int:
        """How many the index remembers."""
        lines = self.client().get("/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith("cachesrv_index_absences ")]
        return int(float(line.split()[1]))

    def forget_nars(self) -> None:
        """Take from its disk cache what is in it, behind its back; what is on its way there is waited for."""
        cache = self.data_dir / "nar-cache"
        until(lambda: not any(cache.rglob(".incoming-*")), "something is always on its way into the disk cache")
        for file in cache.rglob("*.nar*"):
            file.unlink()

    def snapshot(self) -> dict[str, Any]:
        """All that is stored, unfinished objects too, and every published path."""
        return self.stored.state() | {"published": self.query(_EVERYTHING)}

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the catalog behind the server's back."""
        uri = f"file:{self.data_dir / 'catalog.sqlite'}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE)) as connection:
            return connection.execute(sql, values).fetchall()


def inherited() -> dict[str, str]:
    """What a program of a test needs of our environment: nothing else may have an influence on it."""
    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that is to come true by itself; `what` says of it that it did not."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def peak_memory(pid: int) -> int:
    """Bytes of memory that a process held at most (proc(5), VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/{pid}/status names no VmHWM")
