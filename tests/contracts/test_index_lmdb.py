from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis.stateful import precondition, rule

from cachesrv.index.lmdb import LmdbIndex
from tests.contracts.index_contract import NEGATIVE_LIMIT, IndexContract, IndexMachine, OpenIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cachesrv.index.base import Index


class TestLmdbIndex(IndexContract):
    @pytest.fixture
    def open_index(self, tmp_path: Path) -> Iterator[OpenIndex]:
        with ExitStack() as opened:

            def open_one(**arguments: object) -> Index:
                index = LmdbIndex(str(tmp_path / "index"), **arguments)  # type: ignore[arg-type]  # as OpenIndex says
                opened.callback(index.close)
                return index

            yield open_one


class LmdbMachine(IndexMachine):
    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="cachesrv-index-")
        super().__init__()

    def open_index(self, *, negative_limit: int, clock: Callable[[], float]) -> Index:
        return LmdbIndex(self.path, negative_limit=negative_limit, clock=clock)

    @precondition(lambda self: self.model)
    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = self.open_index(negative_limit=NEGATIVE_LIMIT, clock=self.clock)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.path)


TestLmdbMachine = LmdbMachine.TestCase
TestLmdbMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
