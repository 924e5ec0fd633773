from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cachesrv.storage.filesystem import FilesystemStore
from tests.contracts.storage_contract import StorageContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class TestFilesystemStore(StorageContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[FilesystemStore]:
        root = tmp_path / "objects"
        store = FilesystemStore(root)
        yield store
        await store.close()
        assert not [path for path in root.rglob(".*") if path.is_file()]
