"""`cachesrv ls`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from cachesrv.cli import printable
from cachesrv.cli.reading import reading_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.nix.listing import Directory, ListingNode
    from cachesrv.push.contents import Where


@click.command(
    epilog="""\b
Examples:
  cachesrv ls ./result
  cachesrv ls -lR http://127.0.0.1:5000/main/HASH-hello-2.12 bin
  cachesrv ls --from https://cache.nixos.org --json /nix/store/HASH-hello-2.12

WHAT is a store path, a symlink to one, a name inside one, or the URL of one in a cache: <cache>/<hash part>-<name> or
<cache>/<hash part>.narinfo. A path is looked for in the record of what was pushed from here (see
`cachesrv pushed`), in the store here, then in the cache of $CACHESRV_URL or ~/.config/cachesrv/client.toml; a URL, and
--from, ask that cache only.

The listing of a cache is taken at its word; with --verify the NAR is read instead. A signature that does not hold is
an error, when it bears the name of a key that Nix trusts here.

With --json one node as `.ls` files have it; without --recursive its directories say nothing of what is in them.
"""
)
@click.argument("what")
@click.argument("inside", metavar="[NAME-IN-IT]", default="")
@click.option("--long", "-l", "as_table", is_flag=True, help="With modes, sizes in bytes and targets of links.")
@click.option("--recursive", "-R", is_flag=True, help="With all that is below.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@reading_options
def command(what: str, inside: str, *, as_table: bool, recursive: bool, as_json: bool, where: Where) -> None:
    """List what is in a store path, here or in a cache."""
    import asyncio

    name, node = asyncio.run(_find(what, inside, where, recursive=recursive))
    if as_json:
        # names need not be UTF-8 on disk; so escaped they are printed all the same
        click.echo(json.dumps(_document(node, levels=-1 if recursive else 1), separators=(",", ":"), sort_keys=True))
        return
    for path, found in _entries(name, node, recursive=recursive):
        click.echo(_row(path, found) if as_table else printable(path))


async def _find(what: str, inside: str, where: Where, *, recursive: bool) -> tuple[str, ListingNode]:
    from cachesrv.push.contents import open_contents
    from cachesrv.push.members import split

    async with open_contents(what, where, os.environ) as (contents, names):
        found, node = await contents.find((*names, *split(inside)), recursive=recursive)
        return found[-1] if found else what.rstrip("/").rpartition("/")[2], node


def _entries(name: str, node: ListingNode, *, recursive: bool) -> Iterator[tuple[str, ListingNode]]:
    """What is in a directory, by names relative to it; anything else is itself."""
    from cachesrv.nix.listing import Directory

    if isinstance(node, Directory):
        return _below(node, "", recursive=recursive)
    return iter([(name, node)])


def _below(directory: Directory, prefix: str, *, recursive: bool) -> Iterator[tuple[str, ListingNode]]:
    for name, node in sorted(directory.entries.items()):
        yield prefix + name, node
        if recursive and isinstance(node, type(directory)):
            yield from _below(node, f"{prefix}{name}/", recursive=True)


def _row(path: str, node: ListingNode) -> str:
    from cachesrv.nix.listing import Directory, Symlink

    if isinstance(node, Directory):
        return f"dr-xr-xr-x {0:>14} {printable(path)}"
    if isinstance(node, Symlink):
        return f"lrwxrwxrwx {0:>14} {printable(path)} -> {printable(node.target)}"
    mode = "-r-xr-xr-x" if node.executable else "-r--r--r--"
    return f"{mode} {node.size:>14} {printable(path)}"


def _document(node: ListingNode, *, levels: int) -> dict[str, Any]:
    from cachesrv.nix.listing import Directory, Symlink

    if isinstance(node, Symlink):
        return {"type": "symlink", "target": node.target}
    if isinstance(node, Directory):
        inside = {name: _document(child, levels=levels - 1) for name, child in node.entries.items()}
        return {"type": "directory"} | ({"entries": inside} if levels else {})
    offset = {"narOffset": node.nar_offset} if node.nar_offset else {}
    return {"type": "regular", "size": node.size, "executable": node.executable} | offset
