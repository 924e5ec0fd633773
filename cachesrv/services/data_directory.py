"""The data directory: what the first start makes in it, and how secrets are written and read."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import BadInput, ConfigError, StoreError
from cachesrv.nix.signing import SecretKey
from cachesrv.services.access import new_token
from cachesrv.services.replacement import replace_file, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = structlog.get_logger()

_LARGEST_SECRET = 4096


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """Where things lie below the data directory, unless the configuration says otherwise."""

    root: Path

    @property
    def objects(self) -> Path:
        """The storage: one folder a cache, in the standard layout."""
        return self.root / "objects"

    @property
    def catalog(self) -> Path:
        """The SQLite database."""
        return self.root / "catalog.sqlite"

    @property
    def index(self) -> Path:
        """The memory-mapped index."""
        return self.root / "index"

    @property
    def nar_cache(self) -> Path:
        """NARs from afar."""
        return self.root / "nar-cache"

    @property
    def reserve(self) -> Path:
        """What is given up when the disk is full."""
        return self.root / "reserve"

    def scratch(self, job: str, cache: str) -> Path:
        """What a long job keeps while it is not done, to go on from there."""
        return self.root / job / cache

    @property
    def verification(self) -> Path:
        """How far the last verification came that was interrupted."""
        return self.root / "verification"

    @property
    def scheduled_verification(self) -> Path:
        """The same of the one that the server has done from time to time."""
        return self.root / "verification-scheduled"

    @property
    def removed(self) -> Path:
        """Narinfos that nobody could serve, moved out of the way by a repair."""
        return self.root / "removed"

    @property
    def push_token(self) -> Path:
        """The token that may push to all caches of this server."""
        return self.root / "push-token"

    def secret_key(self, cache: str) -> Path:
        """The signing key of a cache."""
        return self.root / "keys" / f"{cache}.secret"

    def public_key(self, cache: str) -> Path:
        """What clients trust."""
        return self.root / "keys" / f"{cache}.public"

    def make(self) -> None:
        """The directory itself, for its owner and group only. Raises ConfigError."""
        try:
            self.root.mkdir(mode=0o750, parents=True, exist_ok=True)
            (self.root / "keys").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the data directory {self.root} cannot be made: {error.strerror}") from error

    def signing_key(self, cache: str) -> SecretKey:
        """The signing key of a cache, made when there is none; beside it lies the public key, of the same one. Raises
        ConfigError, StoreError.
        """
        text = read_or_make(self.secret_key(cache), lambda: SecretKey.generate(f"{cache}-1").render())
        key = parse_secret_key(text, self.secret_key(cache))
        _write_public_key(self.public_key(cache), key.public.render())
        return key

    def token(self) -> str:
        """The push token, made when there is none. Raises ConfigError."""
        token = read_or_make(self.push_token, new_token)
        if not token:
            raise ConfigError(f"{self.push_token} is empty: remove it, and the next start makes a new token")
        return token


def _write_public_key(file: Path, public: str) -> None:
    """Unless it is there. Of another secret key, that somebody has replaced since, it is not to be given to clients."""
    with suppress(FileExistsError):  # as mostly; or another process was first, as in `read_or_make`
        if not file.exists():
            write_new(file, public, mode=0o644)
    try:
        if file.read_bytes().strip() == public.encode():
            return
        replace_file(file, f"{public}\n".encode(), mode=0o644)
    except (OSError, StoreError) as error:  # nobody but people reads it
        _log.warning(
            "the public key beside a secret key cannot be brought up to date", file=str(file), error=str(error)
        )
    else:
        _log.warning(
            "the secret key has been replaced: the public key beside it is new too", file=str(file), key=public
        )


def parse_secret_key(text: str, path: Path) -> SecretKey:
    """Raises ConfigError, that names the file and not what is in it."""
    try:
        return SecretKey.parse(text)
    except BadInput:
        raise ConfigError(f"{path} is not a secret key as `cachesrv key generate` makes one") from None


def read_secret(path: Path) -> str:
    """The one line of a secret's file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_SECRET).decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not the file of a key or token") from None


def read_or_make(path: Path, make: Callable[[], str]) -> str:
    """What a secret's file holds; of several processes that find none, one makes it and all read it."""
    if not path.exists():
        with suppress(FileExistsError):
            write_new(path, make(), mode=0o600)
    return read_secret(path)


def write_new(path: Path, text: str, *, mode: int) -> None:
    """A file of one line, whole or not at all and to stay, never readable for others than `mode` says. Raises
    FileExistsError and StoreError.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123  a descriptor, made private above
                file.write(f"{text}\n".encode())
                file.flush()
                os.fsync(fd)
            os.link(temporary, path)
        finally:
            temporary.unlink()
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
