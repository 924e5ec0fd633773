"""`cachesrv push`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachesrv.cli import SOME_FAILED

if TYPE_CHECKING:
    from cachesrv.push.events import Emit, Summary
    from cachesrv.push.progress import Rendering
    from cachesrv.push.run import Options
    from cachesrv.push.settings import Settings
    from cachesrv.push.upstreams import Upstream


@click.command(
    epilog="""\b
Examples:
  cachesrv push ./result
  cachesrv push --to https://cache.example.org/main --token-file token ./result
  nix-store -qR --include-outputs $(nix-instantiate) | cachesrv push --stdin --no-closure
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
@click.option("--to", metavar="URL", help="The cache, such as http://127.0.0.1:5000/main; without a name, `main`.")
@click.option("--token-file", type=click.Path(path_type=Path), help="A file that holds the token.")
@click.option("--data-dir", metavar="DIR", help="Of a server on this machine, for its push-token.")
@click.option("--stdin", "from_stdin", is_flag=True, help="Read more paths from standard input, one a line.")
@click.option("--no-closure", is_flag=True, help="Push just these paths, not what they refer to.")
@click.option("--dry-run", is_flag=True, help="Say of each path what would be done and why, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one object a line.")
@click.option("--jobs", type=click.IntRange(1, 256), default=8, show_default=True, help="NARs on their way at once.")
@click.option("--level", type=click.IntRange(1, 19), default=3, show_default=True, help="Of the zstd compression.")
@click.option(
    "--memory", type=click.IntRange(16), metavar="MIB", help="For NARs on their way, at most.  [default: 128]"
)
@click.option(
    "--keep-nars",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what is sent there, for Nix to read: --store 'URL?local-nar-cache=DIR'.",
)
@click.option(
    "--upstream",
    "upstreams",
    metavar="URL",
    multiple=True,
    help="A cache whose paths are not pushed, beside those that the server names.",
)
@click.option(
    "--upstream-key",
    "upstream_keys",
    metavar="NAME:KEY",
    multiple=True,
    help="Of those caches.  [default: the keys that Nix trusts here]",
)
@click.option("--no-upstreams", is_flag=True, help="Push also what upstreams of the server have.")
@click.option("--store", metavar="STORE", help="The local store, as Nix names it.  [default: auto]")
def command(
    paths: tuple[str, ...],
    to: str | None,
    token_file: Path | None,
    data_dir: str | None,
    *,
    from_stdin: bool,
    no_closure: bool,
    dry_run: bool,
    as_json: bool,
    jobs: int,
    level: int,
    memory: int | None,
    keep_nars: Path | None,
    upstreams: tuple[str, ...],
    upstream_keys: tuple[str, ...],
    no_upstreams: bool,
    store: str | None,
) -> int:
    """Push store paths to a cache, with all they need."""
    import asyncio

    from cachesrv.push.record import record_file
    from cachesrv.push.run import Options
    from cachesrv.push.settings import Given, find_settings

    if not paths and not from_stdin:
        raise click.UsageError("which paths? name them, or say --stdin", click.get_current_context())
    settings = find_settings(Given(to, token_file, data_dir), os.environ)
    names = [*paths, *(_lines_of_stdin() if from_stdin else ())]
    options = Options(
        jobs=jobs,
        level=level,
        closure=not no_closure,
        dry_run=dry_run,
        memory=memory * 1024 * 1024 if memory else None,
        upstreams=_upstreams(upstreams, upstream_keys),
        declared_upstreams=not no_upstreams,
        record=record_file(os.environ),
        keep_nars=keep_nars,
    )
    with _rendering(as_json=as_json, dry_run=dry_run) as rendering:
        summary = asyncio.run(_push(names, store, settings, options, rendering))
    return SOME_FAILED if summary.failed else 0


async def _push(names: list[str], store: str | None, settings: Settings, options: Options, emit: Emit) -> Summary:
    from cachesrv.push.local_store import opened_store
    from cachesrv.push.run import push

    async with opened_store(store, os.environ) as opened:
        return await push(names, opened, settings, options, emit)


def _upstreams(urls: tuple[str, ...], keys: tuple[str, ...]) -> tuple[Upstream, ...]:
    from cachesrv.errors import BadInput
    from cachesrv.nix.signing import PublicKey, trusted_keys
    from cachesrv.push.trusted import trusted_by_nix
    from cachesrv.push.upstreams import Upstream
    from cachesrv.push.wanted import parse_cache

    if not urls:
        return ()
    try:
        trusted = trusted_keys([PublicKey.parse(key) for key in keys] or trusted_by_nix(os.environ))
    except BadInput as error:
        raise click.BadParameter(str(error), click.get_current_context(), param_hint="--upstream-key") from None
    return tuple(Upstream(parse_cache(url).url.rstrip("/"), trusted) for url in urls)


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
