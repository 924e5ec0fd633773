from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreFull
from cachesrv.storage.memory import MemoryStore
from tests.contracts.storage_contract import StorageContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class TestMemoryStore(StorageContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[MemoryStore]:
        store = MemoryStore()
        yield store
        await store.close()


async def test_the_capacity_counts_what_is_stored_and_what_is_being_written() -> None:
    store = MemoryStore(capacity=100)
    await store.put("a", bytes(60))
    async with store.writer("b") as writer:
        await writer.write(bytes(30))
        with pytest.raises(StoreFull):
            await store.put("c", bytes(11))
        with pytest.raises(StoreFull):
            await writer.write(bytes(11))
    await store.put("a", bytes(40), replace=True)
    await store.delete(["a", "a"])
    assert await store.put("c", bytes(100))
