"""`cachesrv key`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachesrv.cli import SOME_FAILED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.nix.signing import SecretKey

_STDIN = "-"
_LARGEST_KEY = 4096


@click.group(
    epilog="""\b
Examples:
  cachesrv key generate cache.example.org-1 --output cache.secret
  cachesrv key public cache.secret
  cachesrv key sign --key-file cache.secret /srv/cache/*.narinfo
"""
)
def command() -> None:
    """Make signing keys, and sign with them what is not served by cachesrv."""


@command.command(
    epilog="""\b
Examples:
  cachesrv key generate cache.example.org-1 --output cache.secret
  cachesrv key generate cache.example.org-1 | systemd-creds encrypt - cache.cred
  cachesrv key generate cache.example.org-1 --output ~/.local/state/cachesrv/keys/main.secret

The server signs with it when signing_key_files of the cache names the file, or when it lies in its data directory
(the last example) before the first start, which would make one called main-1 there. Clients keep keys by their names,
one of each: name it after what you publish, so that no other server has one of that name, and give a new key a new
name.
"""
)
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the secret key to a new file that only you read.",
)
def generate(name: str, output: Path | None) -> None:
    """Make a signing key called NAME. With --output the public key is printed, else the secret one."""
    from cachesrv.errors import BadInput
    from cachesrv.nix.signing import SecretKey
    from cachesrv.services.data_directory import write_new

    try:
        key = SecretKey.generate(name)
    except BadInput as error:
        raise click.BadParameter(str(error), click.get_current_context(), param_hint="NAME") from None
    if output is None:
        if sys.stdout.isatty():
            raise click.UsageError(
                "that would show the secret key on the terminal: say --output FILE, or send it into a pipe",
                click.get_current_context(),
            )
        click.echo(key.render())
        return
    try:
        write_new(output, key.render(), mode=0o600)
    except FileExistsError:
        raise click.UsageError(f"{output} is there already: a key that was overwritten would be lost") from None
    click.echo(key.public.render())


@command.command(
    epilog="""\b
Examples:
  cachesrv key public ~/.local/state/cachesrv/keys/main.secret
  ssh server cat cache.secret | cachesrv key public -
"""
)
@click.argument("file")
def public(file: str) -> None:
    """Print the public key of a secret one in FILE, or - for stdin."""
    click.echo(_secret_key(file).public.render())


@command.command(
    epilog="""\b
Examples:
  cachesrv key sign --key-file cache.secret /srv/cache/*.narinfo
  find /srv/cache -name '*.narinfo' | cachesrv key sign --key-file cache.secret --stdin
  curl -s https://cache.example.org/HASH.narinfo | cachesrv key sign --key-file cache.secret - > HASH.narinfo

Files are signed in place, standard input to standard output: a signature under the name of the key is replaced, all
else stays as it is, and a file that is signed already is not touched. What cachesrv serves it signs by itself, with the
keys in signing_key_files.

\b
Exit status: 0 done, 2 wrong usage or no such key, 3 some files were not signed and were named.
"""
)
@click.argument("narinfos", metavar="NARINFO...", nargs=-1)
@click.option("--key-file", "key_files", multiple=True, required=True, metavar="FILE", help="A secret key; repeatable.")
@click.option("--stdin", "from_stdin", is_flag=True, help="Read more names of files from standard input, one a line.")
def sign(narinfos: tuple[str, ...], key_files: tuple[str, ...], *, from_stdin: bool) -> int:
    """Sign narinfo files in place; - signs standard input."""
    from cachesrv.errors import CachesrvError

    if not narinfos and not from_stdin:
        raise click.UsageError("which narinfos? name them, or say --stdin", click.get_current_context())
    if from_stdin and _STDIN in narinfos:
        raise click.UsageError("standard input cannot be both names and a narinfo", click.get_current_context())
    keys = [_secret_key(file) for file in key_files]
    failed = False
    for name in [*narinfos, *(_lines_of_stdin() if from_stdin else ())]:
        try:
            if name == _STDIN:
                _sign_stdin(keys)
            else:
                _sign_file(Path(name), keys)
        except CachesrvError as error:
            failed = True
            click.echo(f"cachesrv: {name}: {error}", err=True)
    return SOME_FAILED if failed else 0


def _secret_key(file: str) -> SecretKey:
    from cachesrv.services.data_directory import parse_secret_key, read_secret

    if file == _STDIN:
        text = sys.stdin.buffer.read(_LARGEST_KEY).decode("ascii", "replace").strip()
        return parse_secret_key(text, Path("standard input"))
    return parse_secret_key(read_secret(Path(file)), Path(file))


def _lines_of_stdin() -> Iterable[str]:
    return (name for line in sys.stdin if (name := line.rstrip("\n")))


def _sign_file(path: Path, keys: list[SecretKey]) -> None:
    from cachesrv.errors import NotFound
    from cachesrv.nix import narinfo, narinfo_signatures
    from cachesrv.services.replacement import replace_file

    try:
        with path.open("rb") as file:
            data = file.read(narinfo.DEFAULT_LIMIT + 1)
    except OSError as error:
        raise NotFound(f"cannot be read: {error.strerror}") from None
    signed = narinfo_signatures.sign(data, keys)
    if signed != data:
        replace_file(path, signed, mode=0o644)


def _sign_stdin(keys: list[SecretKey]) -> None:
    from cachesrv.nix import narinfo, narinfo_signatures

    data = sys.stdin.buffer.read(narinfo.DEFAULT_LIMIT + 1)
    sys.stdout.buffer.write(narinfo_signatures.sign(data, keys))
