"""`cachesrv watch-store`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from cachesrv.cli.options import THE_QUEUE, log_level, metrics_file
from cachesrv.cli.pushing import pushing

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.cli.pushing import Choice


@click.command(
    epilog=f"""\b
Examples:
  cachesrv watch-store --to https://cache.example.org/main --token-file token
  cachesrv watch-store --store local --metrics /var/lib/prometheus/node-exporter/cachesrv-queue.prom

For stores whose nix.conf names no post-build-hook: everything that becomes valid is queued and pushed, also what came
from other caches, unless upstreams of the cache have it. It begins with what comes after its first start, and goes on
where it ended. It does all that `cachesrv queue run` does, in its place; `cachesrv queue status` says how it goes.

\b
{THE_QUEUE} Cache and token are found as `cachesrv push` finds them.
"""
)
@pushing
@click.option("--queue", metavar="DIR", help="Where to queue.  [default: see below]")
@click.option("--derivations", is_flag=True, help="Push derivations as well.")
@metrics_file
@log_level
def command(*, choice: Choice, queue: str | None, derivations: bool, metrics: Path | None, log_level: str) -> None:
    """Push what becomes valid in the local store, from now on."""
    from cachesrv.push.queue.directory import queue_directory
    from cachesrv.push.queue.process import Queue
    from cachesrv.push.queue.registered import GATHER, Registered
    from cachesrv.push.queue.report import LogReport
    from cachesrv.push.store_location import locate
    from cachesrv.telemetry import configure_logging

    os.umask(0o077)
    configure_logging(log_level)
    source = Registered(locate(choice.store, os.environ), derivations=derivations)
    source.check()
    Queue(queue_directory(queue, os.environ), choice.way(), LogReport(), metrics, [source]).serve(gather=GATHER)
