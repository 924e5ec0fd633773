"""`cachesrv watch-exec`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from cachesrv.cli.pushing import pushing

if TYPE_CHECKING:
    from cachesrv.cli.pushing import Choice


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  cachesrv watch-exec -- nix-build
  cachesrv watch-exec --to https://cache.example.org/main --token-file token -- nix build .#hello

Pushes everything that becomes valid in the local store while COMMAND runs, whoever built it, already meanwhile; what is
left when COMMAND ends is pushed before this ends. Signals go to COMMAND; a second Ctrl-C ends everything at once.

\b
Exit status: that of COMMAND, 128 + N if signal N ended it; 126 or 127 if it cannot be started; 1 or 2 if the store, or
the configuration, cannot be used, and COMMAND was not started. What could not be pushed is told, and is no failure.
""",
)
@click.argument("words", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@pushing
@click.option("--derivations", is_flag=True, help="Push derivations as well.")
def command(words: tuple[str, ...], *, choice: Choice, derivations: bool) -> int:
    """Run a command, and push what it builds."""
    from cachesrv.push.queue.execution import Execution
    from cachesrv.push.queue.registered import Registered
    from cachesrv.push.queue.report import LinesReport
    from cachesrv.push.store_location import locate
    from cachesrv.telemetry import configure_logging

    configure_logging()
    source = Registered(locate(choice.store, os.environ), derivations=derivations)
    source.check()
    return Execution(words, source, choice.way(), LinesReport(sys.stderr), sys.stderr).run()
