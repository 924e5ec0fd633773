"""Numbers in words for people: "2 paths"; sizes and times as the configuration takes them, "1.5 GiB", "90 d"."""

from __future__ import annotations

from datetime import UTC, datetime

_SIZES = ("bytes", "KiB", "MiB", "GiB", "TiB")
_TIMES = ((86_400, "d"), (3_600, "h"), (60, "min"))


def count(number: int, noun: str) -> str:
    """So many of them: "1 path", "2 paths"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(number: int) -> str:
    """Bytes, in the unit that makes it at least 1; one decimal where that says more."""
    amount, unit = float(number), 0
    while amount >= 1024 and unit < len(_SIZES) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.0f} {_SIZES[unit]}" if unit == 0 or amount == int(amount) else f"{amount:.1f} {_SIZES[unit]}"


def time(seconds: int) -> str:
    """A duration, in the largest unit of which it is a whole number."""
    for length, unit in _TIMES:
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def date(at: int) -> str:
    """A moment, given in seconds since the epoch, in UTC."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}Z"


def moment(at: float) -> str:
    """The same as `date`, to the second."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}Z"
