"""An index of which nothing is to be had: its files are damaged, and others have them open.

Lookups go by what it is made from, as they do where a page of it cannot be read. What would change it fails: it may
still answer in other processes, and they would go on to say what holds no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from cachesrv.errors import StoreDamaged

if TYPE_CHECKING:
    from collections.abc import Iterator


class UnusableIndex:
    """See `cachesrv.index.base.Index`; `why` is told to who asks."""

    def __init__(self, why: str) -> None:
        self._why = why

    def _fail(self, *_: object, **__: object) -> NoReturn:
        raise StoreDamaged(self._why)

    get = raw = epoch = snapshot = put = put_absent = hold = delete = clear = scan = count = _fail

    def warm(self) -> Iterator[int]:
        return iter(())

    def close(self) -> None:
        """There is nothing open."""
