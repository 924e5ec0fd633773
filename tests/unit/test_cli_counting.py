"""How far a long piece of work is, told."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from cachesrv.cli.counting import Bars, Lines, Pace, counting

if TYPE_CHECKING:
    import pytest


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_now_and_then() -> None:
    clock, err = Clock(), StringIO()
    with Lines(err, Pace(clock)) as lines:
        lines("main: found", 10, None)
        clock.now += 10
        lines("main: found", 20, None)
        lines("main: read", 5, 20)
        clock.now += 9
        lines("main: read", 6, 20)
        clock.now += 1
        lines("main: read", 7, 20)
    assert err.getvalue() == "main: found 20\nmain: read 7 of 20\n"


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    err = Terminal()
    bars = counting(err)
    assert isinstance(bars, Bars)
    with bars:
        bars("main: found", 20, None)
        bars("main: read", 5, 20)
        bars("main: read", 20, 20)
    assert "main: read" in err.getvalue()
    assert "20/20" in err.getvalue()


def test_lines_elsewhere() -> None:
    assert isinstance(counting(StringIO()), Lines)
