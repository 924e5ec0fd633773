"""Of several errors at once, the one that people should read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError

if TYPE_CHECKING:
    from collections.abc import Iterator


def foremost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of ours, if there is one."""
    leaves = list(_leaves(group))
    return next((error for error in leaves if isinstance(error, CachesrvError)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
