"""The stores of a server that was started once, for commands that work on them beside it; time passes when told to."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

from cachesrv import config, wiring
from cachesrv.cli import run
from cachesrv.services.candidate import Candidate
from cachesrv.services.data_directory import DataDirectory
from cachesrv.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import pytest

    from cachesrv.web.site import Services
    from tests.samples import Sample

Result = TypeVar("Result")
DAY = 86_400

_TIMES = {
    "paths": ("registered_at", "last_used_at", "leased_until"),
    "nars": ("verified_at", "leased_until"),
    "released": ("at",),
    "removals": ("at",),
    "conflicts": ("at",),
    "pins": ("expires_at",),
    "generations": ("at",),
    "locks": ("expires_at",),
}


def pass_time(catalog: Path, seconds: int) -> None:
    """As if all that an SQLite catalog knows of had happened so long before."""
    with closing(sqlite3.connect(catalog, timeout=60)) as connection, connection:
        for table, columns in _TIMES.items():
            changes = ", ".join(f'"{column}" = "{column}" - {seconds}' for column in columns)
            connection.execute(f"UPDATE {table} SET {changes}")
        connection.execute("UPDATE notes SET value = value - ? WHERE name = 'collected'", (seconds,))


class OfflineServer:
    """Below `folder`, with the caches that `text` configures."""

    def __init__(self, folder: Path, text: str = "") -> None:
        self.data = DataDirectory(folder / "data")
        self.data.make()
        self.data.token()
        self.config_file = folder / "cachesrv.toml"
        self.configure(text)
        self.use(self._nothing)

    def configure(self, text: str) -> None:
        self.config_file.write_text(text)
        self.config = config.load(self.config_file, self.data.root, {})

    async def _nothing(self, _services: Services) -> None:
        """Makes what is not there yet."""

    def use(self, work: Callable[[Services], Awaitable[Result]]) -> Result:
        """What some work makes of the stores."""

        async def opened() -> Result:
            async with wiring.open_services(self.config, Metrics()) as services:
                return await work(services)

        return asyncio.run(opened())

    def push(self, *samples: Sample, cache: str = "main", pusher: str = "ann") -> None:
        """Each of them, in order."""
        served = wiring.served_caches(self.config)[cache]

        async def push(services: Services) -> None:
            for sample in samples:
                await services.ingest.receive(served, sample.nar_name, _whole(sample.file), len(sample.file))
                await services.publish.one(served, Candidate.from_narinfo(sample.info), pusher)

        self.use(push)

    def names(self, cache: str = "main") -> set[str]:
        """Of the published paths."""

        async def scan(services: Services) -> set[str]:
            return {record.name async for record in services.catalog.scan(cache)}

        return self.use(scan)

    def objects(self, cache: str = "main") -> set[str]:
        """All that lies in storage of a cache, by name."""
        root = self.data.objects / cache
        return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}

    def pass_time(self, seconds: int) -> None:
        pass_time(self.data.catalog, seconds)

    def command(self, *arguments: str) -> int:
        """Run a command on these stores; its exit status."""
        options = ["--data-dir", str(self.data.root), "--config", str(self.config_file)]
        return run([*arguments, *options])

    def said(self, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
        """What a command prints."""
        capsys.readouterr()
        assert self.command(*arguments) == status, capsys.readouterr().err
        return capsys.readouterr().out

    def told(self, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[dict[str, Any]]:
        """What a command prints for programs."""
        return [json.loads(line) for line in self.said(capsys, *arguments, "--json", status=status).splitlines()]


async def _whole(data: bytes) -> AsyncIterator[bytes]:
    yield data
