"""The options of all commands that push on their own: from which store, to which cache, and how."""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_OPTIONS = (
    click.option("--to", metavar="URL", help="The cache, such as http://127.0.0.1:5000/main; without a name, `main`."),
    click.option("--token-file", type=click.Path(path_type=Path), help="A file that holds the token."),
    click.option("--data-dir", metavar="DIR", help="Of a server on this machine, for its push-token."),
    click.option("--no-closure", is_flag=True, help="Push just the paths, not what they refer to."),
    click.option(
        "--jobs", type=click.IntRange(1, 256), default=8, show_default=True, help="NARs on their way at once."
    ),
    click.option("--level", type=click.IntRange(1, 19), default=3, show_default=True, help="Of the zstd compression."),
    click.option(
        "--memory", type=click.IntRange(16), metavar="MIB", help="For NARs on their way, at most.  [default: 128]"
    ),
    click.option("--store", metavar="STORE", help="The local store, as Nix names it.  [default: auto]"),
)


def pushing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command these options, and calls it with a `way` in their place."""

    @wraps(function)
    def command(
        *arguments: Any,
        to: str | None,
        token_file: Path | None,
        data_dir: str | None,
        no_closure: bool,
        jobs: int,
        level: int,
        memory: int | None,
        store: str | None,
        **others: Any,
    ) -> Any:
        from cachesrv.push.queue.pusher import Way
        from cachesrv.push.run import Options
        from cachesrv.push.settings import Given

        options = Options(
            jobs=jobs, level=level, closure=not no_closure, memory=memory * 1024 * 1024 if memory else None
        )
        way = Way(store, Given(to, token_file, data_dir), options, os.environ)
        return function(*arguments, way=way, **others)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command
