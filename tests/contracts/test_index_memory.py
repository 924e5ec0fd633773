from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from cachesrv.index.memory import MemoryIndex
from tests.contracts.index_contract import IndexContract, IndexMachine, OpenIndex

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachesrv.index.base import Index


class TestMemoryIndex(IndexContract):
    @pytest.fixture
    def open_index(self) -> OpenIndex:
        return MemoryIndex


class MemoryMachine(IndexMachine):
    def open_index(self, *, negative_limit: int, clock: Callable[[], float]) -> Index:
        return MemoryIndex(negative_limit=negative_limit, clock=clock)


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
