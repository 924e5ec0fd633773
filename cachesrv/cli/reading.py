"""The options that `ls` and `cat` share: where a store path is read from, and what is checked of it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from cachesrv.cli.options import token_of_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cachesrv.push.contents import Where

_OPTIONS = (
    click.option("--from", "cache", metavar="URL", help="A binary cache, of whatever kind."),
    token_of_private,
    click.option(
        "--trusted-key", "trusted", multiple=True, metavar="NAME:KEY", help="One of these has to have signed."
    ),
    click.option("--verify", is_flag=True, help="Read the whole NAR and check its hash before anything is printed."),
)


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the function gets them as `where`."""

    @functools.wraps(function)
    def wrapped(
        *, cache: str | None, token_file: Path | None, trusted: tuple[str, ...], verify: bool, **others: Any
    ) -> Any:
        return function(where=_where(cache, token_file, trusted, verify=verify), **others)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _where(cache: str | None, token_file: Path | None, trusted: tuple[str, ...], *, verify: bool) -> Where:
    from cachesrv.errors import BadInput
    from cachesrv.nix.signing import PublicKey
    from cachesrv.push.contents import Where

    try:
        keys = tuple(map(PublicKey.parse, trusted))
    except BadInput as error:
        raise click.BadParameter(str(error), click.get_current_context(), param_hint="--trusted-key") from None
    return Where(cache, token_file, keys, check_all=verify)
