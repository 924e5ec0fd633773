"""What several commands have in common in what they take and say."""

from __future__ import annotations

import click

THE_QUEUE = """\
The queue is that of --queue or $CACHESRV_QUEUE_DIR, else /var/lib/cachesrv-queue for root,
~/.local/state/cachesrv/queue for others."""

log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Of the log, on stderr.",
)
