"""What `cachesrv serve` keeps of its configuration, and what it tells at its start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from cachesrv.cli.serve import _from_afar, _Latest
from cachesrv.config import Config
from cachesrv.errors import ConfigError
from cachesrv.wiring import Declared

if TYPE_CHECKING:
    from collections.abc import Callable


def test_what_cannot_be_read_again_changes_nothing() -> None:
    """Also when it is a defect of ours: all workers would end with the first process."""
    first, second = (Declared(Config(data_dir=Path("/nowhere")), {}, ()) for _ in range(2))

    def raising(error: Exception) -> Callable[[], Declared]:
        def read() -> Declared:
            raise error

        return read

    latest = _Latest(lambda: first)
    for error in (ConfigError("it is wrong"), RecursionError("a defect")):
        latest.read = raising(error)
        with structlog.testing.capture_logs() as logs:
            assert not latest.renew()
        assert "the configuration stays as it was" in logs[0]["event"]
        assert latest.good is first
    latest.read = lambda: second
    assert latest.renew()
    assert latest.good is second


@pytest.mark.parametrize(
    ("here", "from_afar"),
    [
        ("http://127.0.0.1:5000/main", "http://HOST:5000/main"),
        ("http://[::1]:5000/main", "http://HOST:5000/main"),
        ("https://localhost/main", "https://HOST/main"),
        ("https://cache.example.org/main", "https://cache.example.org/main"),
    ],
)
def test_where_another_machine_is_to_push(here: str, from_afar: str) -> None:
    assert _from_afar(here) == from_afar
