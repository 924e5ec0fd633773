"""Where the token comes from. It is read again when the server stops accepting it, so that one can be renewed
during a long push; it is never part of a message or a representation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput, ConfigError
from cachesrv.push.netrc import password_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

MAX_FILE_SIZE = 1024 * 1024
"""Bytes of a token file or netrc, at most."""

_plain = re.compile(r"[!-~]{1,4096}").fullmatch


class TokenSource(Protocol):
    """A place that may hold a token; `str()` says in words which."""

    def read(self) -> str | None:
        """The token as it is now, None if there is none. Raises ConfigError when it cannot be read."""


class FirstToken:
    """The first of several places that has one; they are all looked at each time, since one may come into being later.
    `found` is the place that had it last.
    """

    def __init__(self, places: Callable[[], Iterable[TokenSource]]) -> None:
        self._places = places
        self.found: TokenSource | None = None

    def read(self) -> str | None:
        for place in self._places():
            token = place.read()
            if token is not None:
                self.found = place
                return token
        self.found = None
        return None

    def __str__(self) -> str:
        return "nowhere" if self.found is None else str(self.found)

    def __repr__(self) -> str:
        return f"FirstToken({self.found!r})"


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file with the token as its only line."""

    path: Path

    def read(self) -> str | None:
        return _checked(read_private(self.path).strip(), str(self))

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class TokenVariable:
    """An environment variable, read at the start."""

    name: str
    value: _Hidden

    def read(self) -> str | None:
        return _checked(self.value.text.strip(), str(self))

    def __str__(self) -> str:
        return f"${self.name}"

    @classmethod
    def of(cls, name: str, text: str) -> TokenVariable:
        return cls(name, _Hidden(text))


@dataclass(frozen=True, slots=True)
class NetrcEntry:
    """The password of a machine in a netrc file, or that of its `default` entry."""

    path: Path
    host: str

    def read(self) -> str | None:
        try:
            password = password_for(self.host, read_private(self.path))
        except BadInput as error:
            raise ConfigError(f"{self.path}, {error}") from None
        return None if password is None else _checked(password, str(self))

    def __str__(self) -> str:
        return f"{self.path} (machine {self.host})"


@dataclass(frozen=True, slots=True, repr=False)
class _Hidden:
    text: str

    def __repr__(self) -> str:
        return "…"


def is_nowhere(tokens: TokenSource) -> bool:
    """Whether no token was found when it was last read."""
    return isinstance(tokens, FirstToken) and tokens.found is None


def read_private(path: Path) -> str:
    """Text of a small file. Raises ConfigError, which names the file and nothing that is in it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_SIZE + 1)
        if len(data) > MAX_FILE_SIZE:
            raise ConfigError(f"{path} is no file of ours: it has more than {MAX_FILE_SIZE} bytes")
        return data.decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text") from None


def _checked(token: str, source: str) -> str:
    if not _plain(token):
        raise ConfigError(f"what {source} holds is no token: it has to be one word of printable ASCII")
    return token
