from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from cachesrv.catalog.sql import SqlCatalog
from tests.contracts.catalog_contract import CatalogContract, CatalogMachine, OpenCatalog
from tests.contracts.rebuilding_contract import RebuildingContract
from tests.contracts.retention_contract import RetentionContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cachesrv.catalog.base import Catalog


class TestSqliteCatalog(CatalogContract, RebuildingContract, RetentionContract):
    @pytest.fixture
    async def open_catalog(self, tmp_path: Path) -> AsyncIterator[OpenCatalog]:
        async with AsyncExitStack() as opened:

            async def open_one() -> Catalog:
                catalog = await SqlCatalog.open(f"sqlite:///{tmp_path}/catalog.sqlite")
                opened.push_async_callback(catalog.close)
                return catalog

            yield open_one


class SqliteMachine(CatalogMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="cachesrv-catalog-")
        self.runner = asyncio.Runner()
        self.run: Any = self.runner.run
        self.catalog = self.run(SqlCatalog.open(f"sqlite:///{self.folder}/catalog.sqlite"))

    def teardown(self) -> None:
        self.run(self.catalog.close())
        self.runner.close()
        shutil.rmtree(self.folder)


TestSqliteMachine = SqliteMachine.TestCase
TestSqliteMachine.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
