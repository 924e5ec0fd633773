"""`nix-cache-info`: what a binary cache says of itself, as lines `Key: value`.

Lines without a colon and unknown keys are passed over, values are trimmed, the last of repeated keys counts.
Source: Nix, `src/libstore/binary-cache-store.cc`, manual `protocols/binary-cache/nix-cache-info.md`.
"""

import re
from dataclasses import dataclass

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.store_path import check_store_dir

DEFAULT_LIMIT = 1 << 16
"""Bytes of the largest `nix-cache-info` that is read unless the caller says otherwise."""

_BLANKS = " \t\r\n"
_MAX_PRIORITY = 2**31 - 1
# Nix reads a number as C does: what follows it is passed over. Ten digits hold all that it takes.
_match_number = re.compile(r"[+-]?[0-9]{1,10}(?![0-9])").match


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """`store_dir` is None where the cache does not say; clients then take it for theirs.

    Clients ask caches in ascending order of `priority`. Those that do not `want_mass_query` are left out
    of questions for many paths. BadInput for a directory or a priority that no client reads.
    """

    store_dir: str | None = None
    want_mass_query: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        if self.store_dir is not None:
            check_store_dir(self.store_dir)
        if abs(self.priority) > _MAX_PRIORITY:
            raise BadInput(f"priority {self.priority} of a cache is beyond {_MAX_PRIORITY}")


def render(info: CacheInfo) -> bytes:
    """The lines as clients read them, all of them stated."""
    lines = [f"WantMassQuery: {int(info.want_mass_query)}\n", f"Priority: {info.priority}\n"]
    if info.store_dir is not None:
        lines.insert(0, f"StoreDir: {info.store_dir}\n")
    return "".join(lines).encode("ascii")


def parse(data: bytes, *, limit: int = DEFAULT_LIMIT) -> CacheInfo:
    """Read at most `limit` bytes (TooLarge beyond); raises BadInput where a client could not use it."""
    if len(data) > limit:
        raise TooLarge(f"a nix-cache-info of {len(data)} bytes exceeds the limit of {limit}")
    values: dict[str, str] = {}
    for line in data.decode("latin-1").split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            values[key] = value.strip(_BLANKS)
    return CacheInfo(
        store_dir=values.get("StoreDir"),
        want_mass_query=values.get("WantMassQuery") == "1",
        priority=_read_priority(values.get("Priority", "0")),
    )


def _read_priority(value: str) -> int:
    number = _match_number(value)
    if number is None:
        raise BadInput(f"priority {value[:40]!r} of a cache is not a number")
    return int(number[0])
