"""`cachesrv pushed`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachesrv.push.pushed import Pushed, PushedOutput
    from cachesrv.push.record import PushedPath, Reads


@click.command(
    epilog="""\b
Examples:
  cachesrv pushed
  cachesrv pushed --json ./result
  cachesrv pushed --reads

The record is of what `cachesrv push` of this user sent in the last 30 days, with the entries of each path's
nix-support (--json: null where the cache had the NAR of another path, so that none went by), and lies in
$XDG_STATE_HOME/cachesrv or ~/.local/state/cachesrv; $CACHESRV_PUSHED names another file. `cachesrv cat` and `ls` read
from it before they ask a cache; --reads tells how often that was spared.
"""
)
@click.argument("paths", metavar="[PATH...]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a path and line.")
@click.option("--reads", "show_reads", is_flag=True, help="Where files were read from, and the downloads avoided.")
def command(paths: tuple[str, ...], *, as_json: bool, show_reads: bool) -> None:
    """Tell what was pushed from here, and what build systems read of it."""
    from cachesrv.push.pushed import open_pushed

    with open_pushed(os.environ) as pushed:
        if show_reads:
            _show_reads(pushed.reads(), as_json=as_json)
        elif paths or as_json:
            for path in _named(pushed, paths):
                _show(pushed.pushes(path), pushed.find(path), as_json=as_json)
        else:
            for push in pushed.paths():
                click.echo(_row(push))


def _named(pushed: Pushed, paths: tuple[str, ...]) -> list[str]:
    """In full; without names all that were pushed."""
    from cachesrv.errors import NotFound
    from cachesrv.push import wanted
    from cachesrv.push.store_location import locate

    location = locate(None, os.environ)
    if not paths:
        return list(dict.fromkeys(push.path for push in pushed.paths()))
    named = []
    for text in paths:
        asked = wanted.parse(text, location)
        named.append(f"{location.store_dir}/{asked.hash_part}-{asked.name}")
        if not pushed.pushes(named[-1]):
            raise NotFound(f"{text} was not pushed from here, or too long ago")
    return named


def _show(pushes: list[PushedPath], output: PushedOutput | None, *, as_json: bool) -> None:
    """`output` is None if nothing is known of what is in it."""
    from cachesrv.push.one_line import one_line

    if as_json:
        click.echo(_json(_document(pushes, output)))
        return
    for push in pushes:
        click.echo(_row(push))
    for file in output.files.values() if output else ():
        what = f"{file.size} bytes, sha256 {file.sha256}" if file.kind == "regular" else file.kind
        click.echo(f"  {one_line(file.name)}  {what}")


def _show_reads(reads: Mapping[str, Reads], *, as_json: bool) -> None:
    from cachesrv.push.pushed import CACHE, RECORD, STORE
    from cachesrv.push.record import Reads

    counts = {source: reads.get(source, Reads()) for source in (RECORD, STORE, CACHE)}
    if as_json:
        click.echo(_json({source: {"count": one.count, "bytes": one.bytes} for source, one in counts.items()}))
        return
    names = {RECORD: "from the record", STORE: "from the store here", CACHE: "downloaded"}
    for source, one in counts.items():
        click.echo(f"{one.count:8} reads {names[source]}, {one.bytes} bytes")
    click.echo(f"{counts[RECORD].count + counts[STORE].count:8} downloads avoided")


def _row(push: PushedPath) -> str:
    from cachesrv.services import amounts

    return f"{amounts.moment(push.at)}  {push.path}  {push.cache}"


def _document(pushes: list[PushedPath], output: PushedOutput | None) -> dict[str, Any]:
    import msgspec

    latest = pushes[0]
    files = None if output is None else map(msgspec.to_builtins, output.files.values())
    return {
        "path": latest.path,
        "nar_hash": latest.nar_hash,
        "nar_size": latest.nar_size,
        "pushes": [{"cache": push.cache, "at": push.at} for push in pushes],
        "files": files and [{name: value for name, value in file.items() if name != "content"} for file in files],
    }


def _json(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value, separators=(",", ":"))
