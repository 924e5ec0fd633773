"""Where Nix's configuration lies on this machine, and whom its daemon believes.

Source: Nix, `src/libstore/globals.cc`, `src/libutil/config.cc`, the manual's `nix.conf`.
"""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.errors import ConfigError
from cachesrv.push.nix_conf import split, words
from cachesrv.push.store_location import locate
from cachesrv.push.token import read_private

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MAX_INCLUDES = 8


@dataclass(frozen=True, slots=True)
class ConfFiles:
    """A nix.conf, and the netrc beside it."""

    conf: Path
    netrc: Path


def user_files(environ: Mapping[str, str]) -> ConfFiles:
    """Those of the user. Raises ConfigError when there is no home."""
    stated = environ.get("NIX_USER_CONF_FILES", "").split(":")[0]
    if stated:
        return ConfFiles(Path(stated), Path(stated).parent / "netrc")
    config, home = environ.get("XDG_CONFIG_HOME"), environ.get("HOME")
    if not config and not home:
        raise ConfigError("no place for the settings of a user: set $HOME, or say --system")
    folder = Path(config or f"{home}/.config") / "nix"
    return ConfFiles(folder / "nix.conf", folder / "netrc")


def system_files(environ: Mapping[str, str]) -> ConfFiles:
    """Those of the machine."""
    folder = Path(environ.get("NIX_CONF_DIR") or "/etc/nix")
    return ConfFiles(folder / "nix.conf", folder / "netrc")


def read(path: Path) -> str:
    """The text of a file, empty when there is none. Raises ConfigError."""
    return read_private(path) if os.path.lexists(path) else ""


def lines(path: Path, depth: int = _MAX_INCLUDES) -> Iterator[str]:
    """The lines of a nix.conf with what it includes; none when it is not there. Raises ConfigError."""
    for line in split(read(path)):
        command, _, included = line.partition("#")[0].strip().partition(" ")
        if command not in {"include", "!include"}:
            yield line
        elif depth:
            yield from lines(path.parent / included.strip(), depth - 1)


def distrusts(environ: Mapping[str, str], system: ConfFiles) -> str | None:
    """The name of the present user when Nix's daemon will not take the settings in question from it, else None.

    There is no daemon where this user may write the store's database: then Nix does it all by itself.
    """
    location = locate(None, environ)
    if os.access(location.state_dir, os.W_OK) or not os.access(location.socket, os.F_OK):
        return None
    user = _user_name(os.geteuid())
    believed = words(lines(system.conf), "trusted-users", ["root"])
    if "*" in believed or user in believed or any(f"@{group}" in believed for group in _groups()):
        return None
    return user


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _groups() -> Iterator[str]:
    for gid in {os.getegid(), *os.getgroups()}:
        try:
            yield grp.getgrgid(gid).gr_name
        except KeyError:
            continue
