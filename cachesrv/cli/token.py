"""`cachesrv token`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachesrv.cli import offline

if TYPE_CHECKING:
    from cachesrv.config import Config
    from cachesrv.services.tokens import KnownToken

_HEADER = ("NAME", "STATE", "CACHES", "PERMISSIONS", "EXPIRES", "KEPT IN")


@click.group(
    epilog="""\b
Examples:
  cachesrv token create ci --permission push --cache main --expires 90d > token
  cachesrv token list
  cachesrv token revoke ci

Run it where the server runs, as its user. The server need not be restarted.
"""
)
def command() -> None:
    """Say who may read, push and delete."""


@command.command(
    epilog="""\b
Examples:
  cachesrv token create ci --permission push --cache main --expires 90d --output token
  cachesrv token create laptops --permission pull --cache 'team-*'

The token is shown this once: the server keeps only its hash. It goes into the file of `cachesrv push --token-file`,
or into a netrc as the password (`cachesrv use` writes one).
"""
)
@click.argument("name")
@click.option("--cache", "caches", multiple=True, metavar="GLOB", help="Where; repeatable.  [default: all caches]")
@click.option(
    "--permission",
    "permissions",
    multiple=True,
    default=("pull",),
    show_default=True,
    type=click.Choice(["pull", "push", "delete", "admin"]),
    help="What; repeatable. push includes pull, admin all.",
)
@click.option("--expires", metavar="TIME", help='When it ends by itself, such as "30d" from now.  [default: never]')
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it to a new file that only you read."
)
@offline.server_options
def create(
    name: str,
    *,
    caches: tuple[str, ...],
    permissions: tuple[str, ...],
    expires: str | None,
    output: Path | None,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Make a token called NAME and print it."""
    from cachesrv.services import tokens

    _check_name(name)
    lifetime = None if expires is None else offline.seconds(expires, "--expires")
    config = offline.load(config_file, data_dir)
    _check_caches(caches, config)
    token = offline.with_catalog(
        config,
        lambda catalog: tokens.create(
            catalog, config, name, caches=caches or ("*",), permissions=permissions, lifetime=lifetime
        ),
    )
    if output is None:
        click.echo(token)
        return
    try:
        _write(output, token)
    except BaseException:
        # nobody will ever have it
        offline.with_catalog(config, lambda catalog: tokens.revoke(catalog, config, name))
        raise


@command.command(
    "list",
    epilog="""\b
Examples:
  cachesrv token list
  cachesrv token list --json | jq -r 'select(.state == "good").name'

With --json one object a line; times are seconds since the epoch.
""",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@offline.server_options
def list_(*, as_json: bool, config_file: Path | None, data_dir: str | None) -> None:
    """List all tokens by name, those that are no longer good too."""
    import msgspec

    from cachesrv.services import tokens

    config = offline.load(config_file, data_dir)
    found = offline.with_catalog(config, lambda catalog: tokens.known(catalog, config))
    if as_json:
        for token in found:
            click.echo(msgspec.json.encode(token))
    else:
        _echo_table([_HEADER, *map(_row, found)])


@command.command(
    epilog="""\b
Example:
  cachesrv token revoke ci

A server that knows the token refuses it after 30 seconds at the latest.
"""
)
@click.argument("name")
@offline.server_options
def revoke(name: str, config_file: Path | None, data_dir: str | None) -> None:
    """Make the token called NAME worthless."""
    from cachesrv.services import tokens

    config = offline.load(config_file, data_dir)
    offline.with_catalog(config, lambda catalog: tokens.revoke(catalog, config, name))


def _write(output: Path, token: str) -> None:
    from cachesrv.services.data_directory import write_new

    try:
        write_new(output, token, mode=0o600)
    except FileExistsError:
        raise click.UsageError(f"{output} is there already", click.get_current_context()) from None


def _check_name(name: str) -> None:
    import msgspec

    from cachesrv.config import TokenName

    try:
        msgspec.convert(name, TokenName)
    except msgspec.ValidationError:
        raise click.BadParameter(
            "a name has 1 to 100 characters of printable ASCII", click.get_current_context(), param_hint="NAME"
        ) from None


def _check_caches(patterns: tuple[str, ...], config: Config) -> None:
    names = [cache.name for cache in config.cache]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise click.BadParameter(
                f"no cache matches {pattern!r}; there are {', '.join(names)}",
                click.get_current_context(),
                param_hint="--cache",
            )


def _row(token: KnownToken) -> tuple[str, ...]:
    from cachesrv.services import amounts

    ends = "never" if token.expires_at is None else amounts.date(token.expires_at)
    return token.name, token.state, " ".join(token.caches), " ".join(token.permissions), ends, token.source


def _echo_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
