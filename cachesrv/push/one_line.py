"""Text from a server on its way to a terminal or a log."""

from __future__ import annotations

_LONGEST = 300


def one_line(text: str) -> str:
    """Fit for a terminal: no control characters, one line, not too long."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
