"""Text from elsewhere on its way to a terminal or a log."""

from __future__ import annotations

_LONGEST = 300


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Fit for a terminal: no control characters, one line, not too long."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
