"""Where a Nix store of this machine lies, and which of its paths a file belongs to.

[Nix, src/libstore/store-reference.cc, store-registration.cc, local-fs-store.hh, globals.cc]
"""

import errno
import math
import os
import stat
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import unquote

from cachesrv.errors import BadInput, ConfigError, NotFound
from cachesrv.nix.store_path import DEFAULT_STORE_DIR, StorePath, check_store_dir

DEFAULT_STATE_DIR = "/nix/var/nix"
DAEMON_TIMEOUT = 60.0
MAX_LINKS = 40


class Access(Enum):
    """How to read a store; AUTO is from the database if it can be read, else by the daemon."""

    AUTO = "auto"
    DAEMON = "daemon"
    DATABASE = "database"


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """The directories of a store, all absolute; none of them needs to exist.

    store_dir: the one that store paths name; real_store_dir: where the files are, which differs in a chroot
    store, and has no symlinks in it; state_dir: holds the database; socket: where a daemon would listen;
    timeout: seconds after which a daemon that says nothing is given up.
    """

    access: Access
    store_dir: str
    real_store_dir: str
    state_dir: Path
    socket: Path
    timeout: float = DAEMON_TIMEOUT

    def real_path(self, path: StorePath) -> str | None:
        """The file, directory or symlink that `path` is on this machine; None if it cannot be read here."""
        file = Path(path.full(self.real_store_dir))
        try:
            mode = file.lstat().st_mode
        except OSError:
            return None
        wanted = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
        return str(file) if stat.S_ISLNK(mode) or os.access(file, wanted) else None

    def resolve(self, path: str) -> StorePath:
        """The store path that `path` is, lies in, or leads to by symlinks.

        Links inside the store are not followed: a link that is a store path is what was asked for. Says nothing
        of whether the store path is valid. Raises `NotFound` for a file that is not there, `BadInput` for one
        that is not in this store.
        """
        if (told := self.resolve_name(path)) is not None:
            return told
        here = ""  # as far as links are resolved, without a slash at the end
        pending = deque(_names(str(Path.cwd() / path)))
        links = 0
        while pending:
            if (name := self._name_in_store(f"{here}/{'/'.join(pending)}")) is not None:
                return StorePath.parse(name)
            step = pending.popleft()
            if step == "..":
                here = here.rpartition("/")[0]
            elif (target := _read_link(f"{here}/{step}", path)) is None:
                here = f"{here}/{step}"
            elif links < MAX_LINKS:
                links += 1
                here = "" if target.startswith("/") else here
                pending.extendleft(reversed(_names(target)))
            else:
                raise BadInput(f"{path!r} leads through more than {MAX_LINKS} symlinks")
        raise BadInput(f"{path!r} is not in the store {self.store_dir}")

    def resolve_name(self, path: str) -> StorePath | None:
        """As `resolve`, for what is a path in the store by its name alone: no file is looked at. None for all else."""
        name = self._name_in_store(f"/{'/'.join(_names(path))}") if path.startswith("/") else None
        return None if name is None else StorePath.parse(name)

    def _name_in_store(self, path: str) -> str | None:
        for directory in (self.store_dir, self.real_store_dir):
            if path.startswith(f"{directory}/"):
                name = os.path.normpath(path[len(directory) + 1 :]).partition("/")[0]
                return None if name in (".", "..") else name
        return None


def locate(store: str | None, environ: Mapping[str, str]) -> StoreLocation:
    """The store that `store` names as Nix's `--store` does; None leaves it to NIX_REMOTE, as Nix does.

    Known are `auto`, `daemon`, `local`, `unix://SOCKET` and the root directory of a chroot store (a path), each
    with `?root=`, `store=`, `real=` and `state=`, and one of our own, `timeout=`, the seconds after which a daemon that
    says nothing is given up. Raises `ConfigError` for anything else.
    """
    text = environ.get("NIX_REMOTE", "") if store is None else store
    base, _, query = text.partition("?")
    parameters = _parameters(query)
    if "\0" in unquote(text):
        raise ConfigError(f"{text!r} is not a store: it has a zero byte in it")
    if base in ("", "auto"):
        if not parameters and (home := _home_store(environ)) is not None:
            return _location(Access.DATABASE, {"root": str(home)}, environ)
        return _location(Access.AUTO, parameters, environ)
    if base == "daemon" or base.startswith("unix://"):
        socket = unquote(base.partition("://")[2])
        return _location(Access.DAEMON, parameters, environ, socket)
    if base == "local" or base.startswith("local://"):
        root = unquote(base.partition("://")[2])
        return _location(Access.DATABASE, {"root": root, **parameters}, environ)
    if "/" in base and "://" not in base:
        return _location(Access.DATABASE, {"root": base, **parameters}, environ)
    raise ConfigError(f"{text!r} is not a store of this machine: name a directory, auto, daemon or local")


def _location(
    access: Access, parameters: Mapping[str, str], environ: Mapping[str, str], socket: str = ""
) -> StoreLocation:
    store_dir = os.path.normpath(parameters.get("store") or _default_store_dir(environ))
    real_store_dir = store_dir
    state_dir = environ.get("NIX_STATE_DIR") or DEFAULT_STATE_DIR
    if root := parameters.get("root"):
        real_store_dir, state_dir = f"{root}/nix/store", f"{root}/nix/var/nix"
    state = Path(parameters.get("state") or state_dir).absolute()
    default_socket = environ.get("NIX_DAEMON_SOCKET_PATH") or state / "daemon-socket" / "socket"
    return StoreLocation(
        access=access,
        store_dir=check_store_dir(store_dir),
        real_store_dir=os.path.realpath(parameters.get("real") or real_store_dir),
        state_dir=state,
        socket=Path(socket or default_socket).absolute(),
        timeout=_timeout(parameters.get("timeout")),
    )


def _timeout(text: str | None) -> float:
    try:
        seconds = DAEMON_TIMEOUT if text is None else float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"timeout={text} is no time to wait for the Nix daemon: give a number of seconds")
    return seconds


def _default_store_dir(environ: Mapping[str, str]) -> str:
    return environ.get("NIX_STORE_DIR") or environ.get("NIX_STORE") or DEFAULT_STORE_DIR


def _home_store(environ: Mapping[str, str]) -> Path | None:
    """The chroot store that Nix keeps for a user who is not root where there is no /nix."""
    if os.getuid() == 0 or environ.get("NIX_STORE_DIR") or environ.get("NIX_STATE_DIR"):
        return None
    data = environ.get("XDG_DATA_HOME") or f"{environ.get('HOME', '')}/.local/share"
    root = Path(data) / "nix" / "root"
    return root if not Path(DEFAULT_STATE_DIR).exists() and os.access(root, os.X_OK) else None


def _parameters(query: str) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in query.split("&") if pair)
    return {unquote(name): unquote(value) for name, _, value in pairs}


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _read_link(file: str, asked: str) -> str | None:
    """Where a symlink leads; None for anything else that is there."""
    try:
        return str(Path(file).readlink())
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound(f"{asked!r} leads nowhere: there is no {file}") from None
        raise BadInput(f"{asked!r} cannot be followed at {file}: {error.strerror}") from None
    except ValueError:
        raise BadInput(f"{asked!r} is not the name of a file") from None
