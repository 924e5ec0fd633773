"""`cachesrv hook`, for those who ask for help or say it wrongly: `cachesrv.__main__` answers all else."""

from __future__ import annotations

import click

from cachesrv.cli.options import THE_QUEUE


@click.command(
    epilog=f"""\b
Examples, in nix.conf:
  post-build-hook = /opt/cachesrv/bin/cachesrv-hook

\b
or, with a queue of its own, a script that nix.conf names:
  #!/bin/sh
  exec /opt/cachesrv/bin/cachesrv hook --queue /srv/queue

Nix sets $OUT_PATHS and $DRV_PATH. They are on disk when this returns; `cachesrv queue run` pushes them.

\b
{THE_QUEUE}

Exit status: 0, also when nothing could be queued, which is told on stderr: Nix ends a build whose hook fails.
2 wrong usage.
"""
)
@click.option("--queue", metavar="DIR", help="Where to queue.")
def command(queue: str | None) -> None:
    """Queue what Nix has just built (its post-build-hook)."""
    from cachesrv.push.queue.hook import hook

    hook(queue)
