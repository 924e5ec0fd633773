"""`cachesrv cat`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from cachesrv.cli.reading import reading_options

if TYPE_CHECKING:
    from cachesrv.push.contents import Where


@click.command(
    epilog="""\b
Examples:
  cachesrv cat ./result/bin/hello > hello
  cachesrv cat http://127.0.0.1:5000/main/HASH-hello-2.12/share/info/hello.info
  cachesrv cat --from https://cache.nixos.org --verify /nix/store/HASH-hello-2.12/bin/hello

FILE is a file in a store path, a name that leads to one, or a URL: <cache>/<hash part>-<name>/<file>. It is looked for
in the record of what was pushed from here (see `cachesrv pushed`), in the store here, then in the cache of
$CACHESRV_URL or ~/.config/cachesrv/client.toml; a URL, and --from, ask that cache only.

Of a large NAR only as much is fetched as is needed, which cannot be checked against the NAR's hash; --verify fetches
all of it, and prints nothing that is wrong. Small ones are always checked. A signature that does not hold is an error,
when it bears the name of a key that Nix trusts here.
"""
)
@click.argument("file")
@reading_options
def command(file: str, *, where: Where) -> None:
    """Print a file in a store path, here or in a cache."""
    import asyncio

    asyncio.run(_cat(file, where))


async def _cat(file: str, where: Where) -> None:
    from cachesrv.push.contents import open_contents

    async with open_contents(file, where, os.environ) as (contents, names):
        await contents.copy(names, sys.stdout.buffer.write)
    sys.stdout.buffer.flush()
