"""`cachesrv push`."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cachesrv.cli import SOME_FAILED
from cachesrv.cli.pushing import Choice, pushing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.push.events import Emit, Event, Summary
    from cachesrv.push.progress import Rendering
    from cachesrv.push.run import Options
    from cachesrv.push.settings import Settings


@click.command(
    epilog="""\b
Examples:
  cachesrv push ./result
  cachesrv push --to https://cache.example.org/main --token-file token ./result
  nix-store -qR --include-outputs $(nix-instantiate) | cachesrv push --stdin --no-closure
  cachesrv push --level auto /run/current-system
  cachesrv push --dry-run /run/current-system

PATH is a store path, a symlink to one, or a name inside one. What it needs at run time is pushed with it.

\b
The cache is that of --to, $CACHESRV_URL, or url in ~/.config/cachesrv/client.toml; on a machine that runs
`cachesrv serve` as it is, none of them is needed. The token is read from --token-file, $CACHESRV_TOKEN,
token_file in client.toml, netrc, or the data directory of a server on this machine.

\b
Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 some paths failed and were named.
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1)
@pushing
@click.option("--stdin", "from_stdin", is_flag=True, help="Read more paths from standard input, one a line.")
@click.option("--dry-run", is_flag=True, help="Say of each path what would be done and why, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one object a line.")
def command(paths: tuple[str, ...], *, choice: Choice, from_stdin: bool, dry_run: bool, as_json: bool) -> int:
    """Push store paths to a cache, with all they need."""
    import asyncio
    from dataclasses import replace

    from cachesrv.cli.heap import look_less_often
    from cachesrv.push.settings import find_settings

    look_less_often()
    if not paths and not from_stdin:
        raise click.UsageError("which paths? name them, or say --stdin", click.get_current_context())
    rendering = _rendering(as_json=as_json, dry_run=dry_run)
    with _summed_up(rendering, always=as_json) as emit:
        settings = find_settings(choice.given, os.environ)
        names = [*paths, *(_lines_of_stdin() if from_stdin else ())]
        options = replace(choice.options, dry_run=dry_run)
        with rendering:
            summary = asyncio.run(_push(names, choice.store, settings, options, emit))
    return SOME_FAILED if summary.failed else 0


async def _push(names: list[str], store: str | None, settings: Settings, options: Options, emit: Emit) -> Summary:
    from cachesrv.push.local_store import opened_store
    from cachesrv.push.run import push

    async with opened_store(store, os.environ) as opened:
        return await push(names, opened, settings, options, emit)


@contextmanager
def _summed_up(rendering: Rendering, *, always: bool) -> Iterator[Emit]:
    """Shows events, the summary last. Where all of it fails before anything is known of any path, people are told why
    and nothing else; programs get a summary `always`.
    """
    from cachesrv.push.events import Summary

    summary = Summary()

    def emit(event: Event) -> None:
        nonlocal summary
        if isinstance(event, Summary):
            summary = event
        else:
            rendering(event)

    try:
        yield emit
    except BaseException:
        if always or summary.paths:
            rendering(summary)
        raise
    rendering(summary)


def _lines_of_stdin() -> list[str]:
    return [name for line in sys.stdin if (name := line.strip())]


def _rendering(*, as_json: bool, dry_run: bool) -> Rendering:
    from cachesrv.push.progress import JsonLines, Lines

    if as_json:
        return JsonLines(sys.stdout)
    if sys.stderr.isatty() and not dry_run and os.environ.get("TERM") != "dumb":
        from cachesrv.push.progress_bars import Bars

        return Bars(sys.stdout, sys.stderr)
    return Lines(sys.stdout, sys.stderr, dry_run=dry_run)
