"""Which cache to push to and with which token, from the command line, the environment and files.

URL: `--to`, `$CACHESRV_URL`, the client configuration; with none of these, on a machine whose data directory has a
push token, that of a server that was started there with no configuration.

Token: `--token-file`, `$CACHESRV_TOKEN`, the client configuration, netrc (`$NETRC`, `~/.netrc`, `/etc/nix/netrc`),
and for a server on this machine the data directory's `push-token`. The configuration's token goes only to the server
that the configuration names, the data directory's only to this machine or where `--data-dir` was given.

Client configuration: `$XDG_CONFIG_HOME/cachesrv/client.toml`, by default below `~/.config`:

    url = "https://cache.example.org/main"
    token_file = "token"        # relative to this file
    level = "auto"              # of the compression, where --level does not say it
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from cachesrv.config import data_dir
from cachesrv.errors import ConfigError
from cachesrv.push.address import Address
from cachesrv.push.level import DEFAULT_LEVEL, STRONGEST, Level
from cachesrv.push.token import FirstToken, NetrcEntry, TokenFile, TokenSource, TokenVariable, read_private

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LOCAL_URL = "http://127.0.0.1:5000/main"
"""What a server with no configuration serves."""

SYSTEM_NETRC = Path("/etc/nix/netrc")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where to push, and where the token for it is; `netrc`: files that may have those for other caches; `level`: of
    the compression, see `level`.
    """

    address: Address
    token: TokenSource
    netrc: tuple[Path, ...] = ()
    level: Level = DEFAULT_LEVEL

    def token_for(self, address: Address) -> TokenSource:
        """That of another cache: never this one's, unless it is of the same server."""
        if address.origin == self.address.origin:
            return self.token
        return FirstToken(lambda: (NetrcEntry(path, address.host) for path in self.netrc if _readable(path)))


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says; None for what it does not."""

    to: str | None = None
    token_file: Path | None = None
    data_dir: str | None = None


class ClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The client configuration; `token_file` is absolute once it is read."""

    url: str | None = None
    token_file: str | None = None
    level: Annotated[int, msgspec.Meta(ge=1, le=STRONGEST)] | Literal["auto"] = DEFAULT_LEVEL


def find_settings(given: Given, environ: Mapping[str, str]) -> Settings:
    """See the module. Raises ConfigError when there is no URL, or for a file that is not as it should be."""
    config = read_client_config(client_config_path(environ))
    address = _address(given, environ, config)
    token = FirstToken(lambda: _sources(given, environ, config, address))
    token.read()
    return Settings(address, token.found or token, tuple(_netrc_files(environ)), config.level)


def client_config_path(environ: Mapping[str, str]) -> Path:
    """Where the client configuration is, if there is one."""
    stated = environ.get("XDG_CONFIG_HOME", "")
    # a relative one is to be passed over, says the specification
    directory = Path(stated) if stated.startswith("/") else _home(environ) / ".config"
    return directory / "cachesrv" / "client.toml"


def read_client_config(path: Path) -> ClientConfig:
    """An empty one when there is no such file. Raises ConfigError."""
    if not os.access(path, os.F_OK):  # also where its folder may not be looked into: a home need not be ours
        return ClientConfig()
    try:
        config = msgspec.convert(tomllib.loads(read_private(path)), ClientConfig)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if config.token_file is None:
        return config
    try:
        token_file = path.parent / Path(config.token_file).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: token_file = {config.token_file!r}: {error}") from None
    return msgspec.structs.replace(config, token_file=str(token_file))


def _address(given: Given, environ: Mapping[str, str], config: ClientConfig) -> Address:
    url = given.to or environ.get("CACHESRV_URL") or config.url
    if url:
        return Address.parse(url)
    if _push_token(given, environ):
        return Address.parse(LOCAL_URL)
    raise ConfigError(
        "which cache? give its URL (--to for pushes), set CACHESRV_URL, or write it to "
        f'{client_config_path(environ)} (a line: url = "https://…/main")'
    )


def _sources(given: Given, environ: Mapping[str, str], config: ClientConfig, address: Address) -> Iterator[TokenSource]:
    if given.token_file is not None:
        yield TokenFile(given.token_file)
    if token := environ.get("CACHESRV_TOKEN"):
        yield TokenVariable.of("CACHESRV_TOKEN", token)
    if config.token_file is not None and _is_for(config, address):
        yield TokenFile(Path(config.token_file))
    for path in _netrc_files(environ):
        if _readable(path):
            yield NetrcEntry(path, address.host)
    if given.data_dir is not None or _is_this_machine(address):
        push_token = _push_token(given, environ)
        if push_token is not None:
            yield TokenFile(push_token)


def _is_for(config: ClientConfig, address: Address) -> bool:
    return config.url is None or Address.parse(config.url).origin == address.origin


def _is_this_machine(address: Address) -> bool:
    return address.is_loopback or address.host == os.uname().nodename.lower()


def _netrc_files(environ: Mapping[str, str]) -> Iterator[Path]:
    if stated := environ.get("NETRC"):
        yield Path(stated)
    else:
        yield _home(environ) / ".netrc"
    yield SYSTEM_NETRC


def _push_token(given: Given, environ: Mapping[str, str]) -> Path | None:
    """The one that a server on this machine made, if it may be read."""
    try:
        path = data_dir(given.data_dir, environ) / "push-token"
    except ConfigError:
        return None  # no home, hence no data directory
    return path if _readable(path) else None


def _home(environ: Mapping[str, str]) -> Path:
    try:
        return Path(environ.get("HOME") or "~").expanduser()
    except RuntimeError:  # a user whom the system does not know
        return Path("/")


def _readable(path: Path) -> bool:
    return os.access(path, os.R_OK)
