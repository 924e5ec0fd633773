"""`cachesrv.push` as programs import it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import cachesrv.push
from cachesrv.push.events import Event


def test_all_names_are_there() -> None:
    for name in cachesrv.push.__all__:
        assert getattr(cachesrv.push, name) is not None
    assert {kind.__name__ for kind in Event.__args__} <= set(cachesrv.push.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        import_module("cachesrv.push").nonsense  # noqa: B018  it is the attribute that is looked for


def test_to_import_it_costs_next_to_nothing() -> None:
    """Hooks import a part of it, and every build waits for them."""
    program = "import sys; before = set(sys.modules); import cachesrv.push; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) == {"cachesrv", "cachesrv.push"}
