"""`cachesrv reindex`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Self

import click

from cachesrv.cli.options import config_file, kept_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from cachesrv.config import Config
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.flaws import Flaw
    from cachesrv.services.reindex import Report
    from cachesrv.web.site import Services


@click.command(
    epilog="""\b
Examples:
  cachesrv reindex
  cachesrv reindex --config /etc/cachesrv.toml --cache main
  cachesrv reindex --sign --json

Makes catalog and index anew from the narinfos that lie in storage: after these were lost, or when somebody else has
written there, as `nix copy --to file://…` does. NARs are looked for and not read (`cachesrv verify` reads them). The
server goes on meanwhile; collecting garbage waits. What is interrupted goes on from there the next time.

What cannot be served is named, with what to do, and the exit status is 3. What is published and lies in storage no
more is served no more. Lost with the catalog are tokens, pins, when paths were used last, and what was remembered of
refused and removed paths.

--sign adds signatures by the keys that the cache has now, where a narinfo lacks them: after a change of keys, or for
what others wrote. Who signs vouches for it; a cache with trusted_keys signs only what one of these has signed.
"""
)
@config_file
@kept_in
@click.option("--cache", "caches", multiple=True, metavar="NAME", help="Only this cache; repeatable.")
@click.option("--sign", is_flag=True, help="Sign narinfos that lack a signature by a key of their cache.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the last with the sums.")
@click.option("--wait", default=60.0, metavar="SECONDS", help="How long to wait for who collects garbage or the like.")
def command(
    config_file: Path | None, data_dir: str | None, caches: tuple[str, ...], *, sign: bool, as_json: bool, wait: float
) -> int:
    """Rebuild catalog and index from storage."""
    import asyncio

    from cachesrv import config, telemetry, wiring

    telemetry.configure_logging()
    wiring.private_umask()
    loaded = config.load(config_file, config.data_dir(data_dir, os.environ), os.environ)
    chosen = _chosen(loaded, caches)
    with _Events() if as_json else _Lines() as output:
        asyncio.run(_reindex(loaded, chosen, output, sign=sign, wait=wait))
    output.sum_up()
    return 3 if output.flaws.count else 0


def _chosen(config: Config, names: tuple[str, ...]) -> list[ServedCache]:
    from cachesrv import wiring
    from cachesrv.errors import ConfigError
    from cachesrv.services.data_directory import DataDirectory

    DataDirectory(config.data_dir).make()
    caches = wiring.served_caches(config)
    if unknown := set(names) - caches.keys():
        raise ConfigError(f"no cache is called {', '.join(sorted(unknown))}; there are {', '.join(caches)}")
    return [cache for cache in caches.values() if not names or cache.name in names]


async def _reindex(
    config: Config, caches: Sequence[ServedCache], output: _Lines | _Events, *, sign: bool, wait: float
) -> None:
    from cachesrv import wiring
    from cachesrv.services.maintenance import maintenance
    from cachesrv.services.removing import Removing
    from cachesrv.telemetry import Metrics

    async with wiring.open_services(config, Metrics()) as services, maintenance(services.catalog, patience=wait):
        # What another one was about to delete when it died is not to be published.
        await Removing(services.storage, services.catalog, services.index).finish(wiring.served_caches(config))
        await services.completeness.find_out(caches)
        for cache in caches:
            await _reindex_one(config, services, _Listener(cache, output), sign=sign)
            await services.completeness.reached(cache)


async def _reindex_one(config: Config, services: Services, listener: _Listener, *, sign: bool) -> None:
    from cachesrv.index.scratch import Scratch
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.services.findings import TABLES
    from cachesrv.services.reindex import Reindex
    from cachesrv.services.resigning import Resigning
    from cachesrv.services.survey import as_found

    cache = listener.cache
    scratch = Scratch(DataDirectory(config.data_dir).scratch("reindex", cache.name), TABLES)
    resigning = Resigning(services.storage, cache, listener.flaw)
    try:
        reindex = Reindex(services.storage, services.catalog, services.index)
        report = await reindex.run(cache, scratch, listener, resigning if sign else as_found)
        scratch.discard()
    finally:
        scratch.close()
    listener.output.done(cache.name, report, resigning.signed)


class _Listener:
    """See `cachesrv.services.reindex.Listener`; of one cache."""

    def __init__(self, cache: ServedCache, output: _Lines | _Events) -> None:
        self.cache = cache
        self.output = output

    def progress(self, report: Report) -> None:
        """See Listener."""
        if report.taken:
            self.output.count(self.cache.name, "published", report.taken, report.listed)
        elif report.read:
            self.output.count(self.cache.name, "read", report.read, report.listed)
        else:
            self.output.count(self.cache.name, "found", report.listed, None)

    def flaw(self, flaw: Flaw) -> None:
        """See Listener."""
        self.output.flaws.tell(flaw)


class _Lines:
    """For people; in it, bars may be on the terminal."""

    def __init__(self) -> None:
        from cachesrv.cli.counting import counting
        from cachesrv.cli.flaw_output import FlawLines

        self.flaws = FlawLines()
        self._counting = counting(sys.stderr)
        self._done: list[str] = []

    def __enter__(self) -> Self:
        self._counting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._counting.__exit__(kind, error, traceback)

    def count(self, cache: str, what: str, done: int, total: int | None) -> None:
        """How far it is."""
        self._counting(f"{cache}: {what}", done, total)

    def done(self, cache: str, report: Report, signed: int) -> None:
        """A cache is done."""
        from cachesrv.services import amounts

        parts = [f"{amounts.count(report.taken, 'path')} served"]
        parts += [f"{amounts.count(signed, 'narinfo')} signed"] if signed else []
        parts += [f"{amounts.count(report.withdrawn, 'path')} withdrawn"] if report.withdrawn else []
        parts += [amounts.count(report.flaws, "flaw")] if report.flaws else []
        self._done.append(f"{cache}: {', '.join(parts)}")

    def sum_up(self) -> None:
        """All is done."""
        for line in self._done:
            click.echo(line)
        self.flaws.sum_up()


class _Events:
    """For programs."""

    def __init__(self) -> None:
        from cachesrv.cli.counting import Pace
        from cachesrv.cli.flaw_output import FlawEvents

        self.flaws = FlawEvents()
        self._pace = Pace()
        self._begun = time.monotonic()
        self._sums: Counter[str] = Counter(paths=0, known=0, signed=0, withdrawn=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def count(self, cache: str, what: str, done: int, total: int | None) -> None:
        """How far it is."""
        if self._pace.is_due():
            self._say({"event": "progress", "cache": cache, "what": what, "done": done, "total": total})

    def done(self, cache: str, report: Report, signed: int) -> None:
        """A cache is done."""
        sums = {"paths": report.taken, "known": report.known, "signed": signed, "withdrawn": report.withdrawn}
        self._sums.update(sums)
        self._say({"event": "cache", "cache": cache, **sums, "flaws": report.flaws})

    def sum_up(self) -> None:
        """All is done."""
        seconds = round(time.monotonic() - self._begun, 3)
        self._say({"event": "summary", **self._sums, "flaws": self.flaws.count, "seconds": seconds})

    @staticmethod
    def _say(event: dict[str, object]) -> None:
        click.echo(json.dumps(event))
