"""The options of all commands that push on their own: from which store, to which cache, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cachesrv.push.level import STRONGEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachesrv.push.level import Level
    from cachesrv.push.queue.pusher import Way
    from cachesrv.push.run import Options
    from cachesrv.push.settings import Given
    from cachesrv.push.upstreams import Upstream


def _level(context: click.Context, option: click.Parameter, value: str | None) -> Level | None:
    if value is None:
        return None
    if value == "auto":
        return "auto"
    if value not in map(str, range(1, STRONGEST + 1)):
        raise click.BadParameter(f"{value!r} is neither a number from 1 to {STRONGEST} nor `auto`", context, option)
    return int(value)


_OPTIONS = (
    click.option("--to", metavar="URL", help="The cache, such as http://127.0.0.1:5000/main; without a name, `main`."),
    click.option("--token-file", type=click.Path(path_type=Path), metavar="FILE", help="A file that holds the token."),
    click.option("--data-dir", metavar="DIR", help="Of a server on this machine, for its push-token."),
    click.option("--no-closure", is_flag=True, help="Push just the paths, not what they refer to."),
    click.option(
        "--jobs", type=click.IntRange(1, 256), default=8, show_default=True, help="NARs on their way at once."
    ),
    click.option(
        "--level",
        callback=_level,
        metavar="LEVEL",
        help=f"Of the zstd compression: 1 to {STRONGEST}, or `auto`: higher while NARs wait for the link, lower while "
        "it waits for them.  [default: 3, or `level` in client.toml]",
    ),
    click.option(
        "--memory", type=click.IntRange(16), metavar="MIB", help="For NARs on their way, at most.  [default: 128]"
    ),
    click.option(
        "--keep-nars",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep what is sent there, for Nix to read: --store 'URL?local-nar-cache=DIR'.",
    ),
    click.option(
        "--upstream",
        "upstreams",
        metavar="URL",
        multiple=True,
        help="A cache whose paths are not pushed, beside those that the server names.",
    ),
    click.option(
        "--upstream-key",
        "upstream_keys",
        metavar="NAME:KEY",
        multiple=True,
        help="Of those caches.  [default: the keys that Nix trusts here]",
    ),
    click.option("--no-upstreams", is_flag=True, help="Push also what upstreams of the server have."),
    click.option("--store", metavar="STORE", help="The local store, as Nix names it.  [default: auto]"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was said: the store, the cache and the token, and how to push."""

    store: str | None
    given: Given
    options: Options

    def way(self) -> Way:
        """For a queue."""
        from cachesrv.push.queue.pusher import Way

        return Way(self.store, self.given, self.options, os.environ)


def pushing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command these options, and calls it with a `choice` in their place."""

    @wraps(function)
    def command(
        *arguments: Any,
        to: str | None,
        token_file: Path | None,
        data_dir: str | None,
        no_closure: bool,
        jobs: int,
        level: Level | None,
        memory: int | None,
        keep_nars: Path | None,
        upstreams: tuple[str, ...],
        upstream_keys: tuple[str, ...],
        no_upstreams: bool,
        store: str | None,
        **others: Any,
    ) -> Any:
        from cachesrv.push.journal import journal_file
        from cachesrv.push.record import record_file
        from cachesrv.push.run import Options
        from cachesrv.push.settings import Given

        options = Options(
            jobs=jobs,
            level=level,
            closure=not no_closure,
            memory=memory * 1024 * 1024 if memory else None,
            upstreams=_upstreams(upstreams, upstream_keys),
            declared_upstreams=not no_upstreams,
            record=record_file(os.environ),
            journal=journal_file(os.environ),
            keep_nars=keep_nars,
        )
        choice = Choice(store, Given(to, token_file, data_dir), options)
        return function(*arguments, choice=choice, **others)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command


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
