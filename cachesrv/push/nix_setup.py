"""Sets up Nix on this machine for a cache: what its files would hold, and the change of them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, ConfigError, Conflict, ServerError, StoreError
from cachesrv.nix.signing import PublicKey
from cachesrv.push import netrc_entry, nix_conf, nix_conf_files
from cachesrv.push.nix_conf import CacheSettings
from cachesrv.services.replacement import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.api import CacheAnswer
    from cachesrv.push.nix_conf_files import ConfFiles


@dataclass(frozen=True, slots=True)
class Login:
    """The password (a token) for a host."""

    host: str
    password: str


@dataclass(frozen=True, slots=True)
class NewText:
    """What a file is to hold, which may be what it holds already."""

    path: Path
    text: str
    changed: bool
    secret: bool


def settings_for(url: str, cache: CacheAnswer, netrc: Path) -> CacheSettings:
    """What clients of the cache set. Raises ServerError for keys that no nix.conf can hold."""
    try:
        keys = tuple(PublicKey.parse(text) for text in cache.public_keys)
    except BadInput as error:
        raise ServerError(f"{url} names a key that is none: {error}") from None
    if any("#" in key.name for key in keys):
        raise ServerError(f"{url} has a key with # in its name, which begins a comment in nix.conf")
    return CacheSettings(url, keys, None if cache.public else str(netrc))


def plan(files: ConfFiles, system: ConfFiles, wanted: CacheSettings, login: Login | None) -> list[NewText]:
    """The files with the settings and the login in them, in the order in which they have to be written.

    Where nix.conf names another netrc already, the login goes there. Raises ConfigError when something in the files
    contradicts, among them the `system` ones, which hold for all users.
    """
    text = nix_conf_files.read(files.conf)
    with _about(files.conf):
        stated = " ".join(nix_conf.words(nix_conf.without_block(text, wanted.url), nix_conf.NETRC_FILE))
        if stated and stated != wanted.netrc_file:
            wanted = replace(wanted, netrc_file=None)
        new = nix_conf.put(text, wanted)
    if system != files:
        with _about(system.conf):
            nix_conf.check_keys(list(nix_conf_files.lines(system.conf)), wanted)
    conf = NewText(files.conf, new, changed=new != text, secret=False)
    return [conf] if login is None else [_netrc(Path(wanted.netrc_file or stated), login), conf]


def write(new: NewText, store_dir: str) -> None:
    """Put the text into its file. Raises ConfigError for a file that is made by NixOS or home-manager, StoreError."""
    if os.path.realpath(new.path).startswith(f"{store_dir}/"):
        raise ConfigError(
            f"{new.path} is made by NixOS or home-manager: put the lines into nix.settings there (without --write they"
            " are printed)"
        )
    try:
        new.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{new.path.parent} cannot be made: {error.strerror}") from error
    replace_file(new.path, new.text.encode(), mode=0o600 if new.secret else 0o644, secret=new.secret)


def _netrc(path: Path, login: Login) -> NewText:
    text = nix_conf_files.read(path)
    with _about(path):
        new = netrc_entry.put(text, login.host, login.password)
    return NewText(path, new, changed=new != text, secret=True)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except (Conflict, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None
