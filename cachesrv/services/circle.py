"""Caches that pull through each other, however indirectly: a question that has come round is asked no further.

Who asks an upstream says whose question it is: all who asked before, and then itself, in a field of the request. Who
finds itself there answers from what it has itself, since it is waiting for this very answer. If it has nothing it is
not sure, as it asked nobody else, and says by a field of its 404 where the question ended. Those on the way back do not
remember that as an absence, until it comes to where it ended: there everybody has been asked.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Mapping

ASKED_BY = "Cachesrv-Asked-By"
ENDED_AT = "Cachesrv-Ended-At"

_NAME = re.compile(r"cachesrv-[0-9a-f]{16}")
_MOST = 32
"""Caches that one question goes through; it ends at the next, as if it had come round."""

_asked_by: ContextVar[tuple[str, ...]] = ContextVar("asked_by", default=())


class CameRound(PeerError):
    """Nobody who could be asked has it, and `name` was not asked as it would ask others."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the question came round to {name}")
        self.name = name


def asked_by() -> tuple[str, ...]:
    """Through whom the question came that is being answered, the first who asked first."""
    return _asked_by.get()


def begin(field: str) -> None:
    """Take up a request with this field, which is empty where it has none. What is asked on its behalf says so."""
    _asked_by.set(tuple(_NAME.findall(field)))


class Circle:
    """As seen from one cache, that is called `name`: `cachesrv-` and 16 hexadecimal digits, or nothing for who answers
    nobody.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name

    @classmethod
    def of(cls, server: str, cache: str) -> Circle:
        """That of a cache of a server, whatever says which server it is."""
        return cls(f"cachesrv-{sha256(f'{cache} at {server}'.encode()).hexdigest()[:16]}")

    @property
    def is_closed(self) -> bool:
        """Whether the question that is being answered is one of our own."""
        return self._name in asked_by() or len(asked_by()) >= _MOST

    def demand_open(self) -> None:
        """Raises CameRound if it is."""
        if self.is_closed:
            raise CameRound(self._name)

    def fields(self) -> dict[str, str]:
        """Of a request to an upstream."""
        names = [*asked_by(), self._name] if self._name else asked_by()
        return {ASKED_BY: ", ".join(names)} if names else {}

    def heed(self, headers: Mapping[str, str]) -> None:
        """Look at the fields of an answer by which an upstream says that it has nothing. Raises CameRound unless it is
        sure of that.
        """
        ended_at = headers.get(ENDED_AT, "")
        if _NAME.fullmatch(ended_at) and ended_at != self._name:
            raise CameRound(ended_at)
