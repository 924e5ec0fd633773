"""What several commands have in common in what they take and say."""

from __future__ import annotations

from pathlib import Path

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

metrics_file = click.option(
    "--metrics", type=click.Path(path_type=Path), metavar="FILE", help="A file for node_exporter's textfile collector."
)

token_of_private = click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file that holds the token of a private cache.",
)

config_file = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="TOML; see config.example.toml."
)

kept_in = click.option(
    "--data-dir", metavar="DIR", help="Where everything is kept.  [default: ~/.local/state/cachesrv]"
)

data_dir_of_server = click.option(
    "--data-dir", metavar="DIR", help="Of the server.  [default: ~/.local/state/cachesrv]"
)
