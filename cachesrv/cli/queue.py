"""`cachesrv queue`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cachesrv.cli import SOME_FAILED
from cachesrv.cli.options import THE_QUEUE, log_level, metrics_file
from cachesrv.cli.pushing import Choice, pushing

if TYPE_CHECKING:
    from collections.abc import Callable


def _on_a_queue(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--queue", metavar="DIR", help="Where hooks queue.  [default: see below]")(function)


@click.group(
    epilog=f"""\b
Examples:
  cachesrv queue run --to https://cache.example.org/main --token-file token
  cachesrv queue status
  cachesrv queue drain

`cachesrv hook` puts into the queue what Nix builds, `cachesrv queue run` pushes it, usually as a service.

\b
{THE_QUEUE}
"""
)
def command() -> None:
    """Push what hooks have queued, and see how it goes."""


@command.command(
    epilog=f"""\b
Examples:
  cachesrv queue run --to https://cache.example.org/main --token-file token
  cachesrv queue run --drain
  cachesrv queue run --metrics /var/lib/prometheus/node-exporter/cachesrv-queue.prom

What fails is kept with its reason and tried again, later each time, and holds up nothing else. What the store has
no more is dropped. Where there is a service already, this waits for its end.

\b
{THE_QUEUE} Cache and token are found as `cachesrv push` finds them.

\b
Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 --drain has left failed paths, which it names.
"""
)
@pushing
@_on_a_queue
@click.option("--drain", is_flag=True, help="End when all has been tried: see `cachesrv queue drain`.")
@click.option(
    "--idle",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End when there was nothing to do for so long.  [default: 60 if started by a socket of systemd, else never]",
)
@metrics_file
@log_level
def run(
    *, choice: Choice, queue: str | None, drain: bool, idle: float | None, metrics: Path | None, log_level: str
) -> int | None:
    """Push what is queued, now and from now on."""
    from cachesrv.push.queue.directory import queue_directory
    from cachesrv.push.queue.process import Queue
    from cachesrv.push.queue.report import LogReport
    from cachesrv.telemetry import configure_logging

    if drain:
        return _drain(choice, queue, metrics)
    os.umask(0o077)
    configure_logging(log_level)
    Queue(queue_directory(queue, os.environ), choice.way(), LogReport(), metrics).serve(idle=idle)
    return None


@command.command(
    epilog=f"""\b
Examples:
  cachesrv queue drain
  cachesrv queue drain --to https://cache.example.org/main --token-file token

For the end of a CI job. What has failed before is tried once more. If a service pushes the queue, this waits until it
has tried everything.

\b
{THE_QUEUE} Cache and token are found as `cachesrv push` finds them.

\b
Exit status: 0 all is in the cache, 1 failed, 2 wrong usage or configuration, 3 some paths failed and were named; they
stay in the queue.
"""
)
@pushing
@_on_a_queue
def drain(*, choice: Choice, queue: str | None) -> int:
    """Push all that is queued, and end."""
    return _drain(choice, queue, None)


@command.command(
    epilog=f"""\b
Examples:
  cachesrv queue status
  cachesrv queue status --json | jq .failed_paths

\b
{THE_QUEUE}
"""
)
@_on_a_queue
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(*, queue: str | None, as_json: bool) -> None:
    """Say what waits, what is on its way, and what has failed and why."""
    import msgspec

    from cachesrv.push.queue.directory import queue_directory
    from cachesrv.push.queue.status import read_status, status_lines
    from cachesrv.telemetry import configure_logging

    configure_logging()
    found = read_status(queue_directory(queue, os.environ))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        for line in status_lines(found):
            click.echo(line)


@command.command(
    epilog=f"""\b
Examples:
  cachesrv queue retry
  cachesrv queue retry /nix/store/…-hello-2.12

\b
{THE_QUEUE}

Exit status: 0 done, 1 failed, 2 wrong usage, 3 some of these paths are not among what has failed, and were named.
"""
)
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@_on_a_queue
def retry(*, paths: tuple[str, ...], queue: str | None) -> int:
    """Try again now what has failed: these paths, or all."""
    from cachesrv.push.queue.process import retry as retry_paths
    from cachesrv.services import amounts

    directory, chosen, unknown = _among_failed(queue, paths)
    number = 0 if paths and not chosen else retry_paths(directory, chosen)
    click.echo(f"{amounts.count(number, 'path')} to be tried again")
    return SOME_FAILED if unknown else 0


@command.command(
    epilog=f"""\b
Examples:
  cachesrv queue forget /nix/store/…-hello-2.12

What has failed, such as a path that the cache refuses, is not tried again and is not told of any more.

\b
{THE_QUEUE}

Exit status: 0 done, 1 failed, 2 wrong usage, 3 some of these paths are not among what has failed, and were named.
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@_on_a_queue
def forget(*, paths: tuple[str, ...], queue: str | None) -> int:
    """Give up paths that have failed."""
    from cachesrv.push.queue.process import forget as forget_paths
    from cachesrv.services import amounts

    directory, chosen, unknown = _among_failed(queue, paths)
    number = forget_paths(directory, chosen) if chosen else 0
    click.echo(f"{amounts.count(number, 'path')} forgotten")
    return SOME_FAILED if unknown else 0


@command.command(
    epilog="""\b
Examples:
  cachesrv queue units
  cachesrv queue units --output /etc/systemd/system

The service pushes what is queued, all the time or, with the socket beside it, when there is something.
"""
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Write them there, in place of older ones.",
)
def units(*, output: Path | None) -> None:
    """Print the units of systemd that run the queue."""
    from cachesrv.push.queue import units as shipped

    if output is None:
        for name, text in shipped.units().items():
            click.echo(f"# ---- {name}\n{text}")
        return
    for file in shipped.write_units(output):
        click.echo(file)
    click.echo(
        "\nWrite /etc/cachesrv/queue.env and /etc/cachesrv/push-token as the service's first lines say, then:\n\n"
        "    systemctl daemon-reload\n"
        "    systemctl enable --now cachesrv-queue.service                          # all the time\n"
        "    systemctl enable --now cachesrv-queue.socket cachesrv-queue.service    # when there is something",
        err=True,
    )
    if (unseen := shipped.unseen_folder()) is not None:
        click.echo(
            f"\nBut the service cannot look into {unseen}, where this cachesrv is: install one for all users, such as"
            " in /opt/cachesrv, and have that one write the units.",
            err=True,
        )


def _among_failed(queue: str | None, paths: tuple[str, ...]) -> tuple[str, list[str], bool]:
    """The queue, those of these paths that have failed, and whether there are others, which are named."""
    from cachesrv.push.queue.directory import queue_directory
    from cachesrv.push.queue.status import read_status
    from cachesrv.telemetry import configure_logging

    configure_logging()
    directory = queue_directory(queue, os.environ)
    failed = {one.path for one in read_status(directory).failed_paths} if paths else set()
    meant = {name: _path_meant(name) for name in paths}
    unknown = [name for name, path in meant.items() if path not in failed]
    for name in unknown:
        click.echo(f"failed {name}: it is not among what has failed: see `cachesrv queue status`", err=True)
    return directory, sorted(failed.intersection(meant.values())), bool(unknown)


def _path_meant(name: str) -> str:
    """A store path in full; the name as it is, where it leads to none: the queue may know it all the same."""
    from cachesrv.errors import BadInput, ConfigError, NotFound
    from cachesrv.push.store_location import locate

    with suppress(BadInput, ConfigError, NotFound):
        location = locate(None, os.environ)
        return location.resolve(name).full(location.store_dir)
    return name


def _drain(choice: Choice, queue: str | None, metrics: Path | None) -> int:
    from cachesrv.push.queue.directory import queue_directory
    from cachesrv.push.queue.process import Queue
    from cachesrv.push.queue.report import LinesReport
    from cachesrv.telemetry import configure_logging

    os.umask(0o077)
    configure_logging()
    left = Queue(queue_directory(queue, os.environ), choice.way(), LinesReport(sys.stderr), metrics).drain()
    for entry in left:
        click.echo(f"failed {entry.path}: {entry.reason}", err=True)
    return SOME_FAILED if left else 0
