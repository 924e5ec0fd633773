"""How often a process looks for garbage."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("call", "frozen"), [("look_less_often", False), ("keep_all_there_is", True)])
def test_garbage_in_cycles_still_goes(call: str, frozen: bool) -> None:
    code = f"""
import gc, weakref
from cachesrv.cli import heap
heap.{call}()
assert (gc.get_freeze_count() > 1000) == {frozen}
class Node: pass
def cycle():
    one = Node()
    one.itself = one
    return weakref.ref(one)
gone = cycle()
kept = [[] for _ in range(2 * gc.get_threshold()[0])]
assert gone() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
