"""What `gc` and `delete` print of paths and NARs that go."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cachesrv.catalog.retention import PathSummary, UnusedNar
    from cachesrv.services.removal_report import Report


class Lines:
    """For people."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        """See Listener."""
        from cachesrv.services import amounts

        if not self._silent:
            click.echo(f"{cache}: {path.base_name}, {amounts.size(path.file_size)}: {reason}")

    def nar(self, nar: UnusedNar) -> None:
        """See Listener."""
        from cachesrv.services import amounts

        if not self._silent:
            since = amounts.date(nar.unused_since)
            click.echo(f"{nar.key}, {amounts.size(nar.file_size)}: needed by no path since {since}")

    def sum_up(self, report: Report, *, grace: int, dry_run: bool) -> None:
        """The last lines."""
        from cachesrv.services import amounts

        go, are = ("would go", "would be deleted") if dry_run else ("have gone", "have been deleted")
        size = amounts.size(report.path_bytes)
        stay = f"stay for {amounts.time(grace)}" if grace else "go at once" if dry_run else "have gone at once"
        click.echo(f"paths: {report.paths} {go}; their NARs, {size}, {stay}")
        if report.nars or grace or not dry_run:
            click.echo(f"NARs: {report.nars} {are}, which gives {amounts.size(report.nar_bytes)} back")
        if report.kept:
            click.echo(f"{amounts.count(report.kept, 'path')} stay that were needed again meanwhile")
        if report.leased:
            size = amounts.size(report.leased_bytes)
            click.echo(f"NARs: {report.leased}, {size}, stay until no push can rely on them: [collect] lease")


class Json:
    """For programs."""

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        """See Listener."""
        summary = {"path": path.base_name, "size": path.file_size, "used_at": path.used_at}
        _echo({"event": "path", "cache": cache, **summary, "reason": reason})

    def nar(self, nar: UnusedNar) -> None:
        """See Listener."""
        _echo({"event": "nar", "key": nar.key, "size": nar.file_size, "unused_since": nar.unused_since})

    def sum_up(self, report: Report, *, grace: int, dry_run: bool) -> None:
        """The last line."""
        _echo({"event": "summary", "dry_run": dry_run, "nar_grace": grace, **asdict(report)})


def _echo(event: dict[str, object]) -> None:
    click.echo(json.dumps(event))
