"""What every catalog promises to who makes it anew from storage, as tests; see `catalog_contract`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog.retention import MAINTENANCE
from cachesrv.errors import BeingRemoved
from tests.contracts.catalog_contract import NOW, Fixtures, hash_part, nar, nar_hash, path, scanned

if TYPE_CHECKING:
    from cachesrv.catalog.base import Catalog


class RebuildingContract(Fixtures):
    async def test_what_is_not_known_becomes_known_as_if_used_then(self, catalog: Catalog) -> None:
        assert await catalog.restore([], used_at=NOW) == {}
        records = [path(1, 1, 2), path(2)]
        assert await catalog.restore(records, used_at=NOW + 50) == {}
        assert await scanned(catalog) == records
        assert {use.used_at for use in await catalog.uses("main", NOW)} == {NOW + 50}

    async def test_what_is_known_stays_as_it_is(self, catalog: Catalog) -> None:
        known = [path(1, pusher="ann"), path(2, 1), path(3)]
        await catalog.publish(known)
        restored = [
            path(1, registered_at=NOW + 9),
            path(2, 3),
            path(3, nar_hash=nar_hash(99)),
            path(4, 3),
        ]
        assert await catalog.restore(restored, used_at=NOW) == {record.hash_part: record for record in known[1:]}
        assert await scanned(catalog) == [*known, restored[3]]

    async def test_what_is_just_being_deleted_is_not_restored(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1, verified_at=1))
        await catalog.lock(MAINTENANCE, "me", now=NOW, until=NOW + 60)
        await catalog.doom([nar(1).key], holder="me", before=NOW, now=NOW)
        with pytest.raises(BeingRemoved):
            await catalog.restore([path(1)], used_at=NOW)
        assert await scanned(catalog) == []

    async def test_only_what_refers_to_what_is_not_published_goes(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2, 1, 2), path(3, 1, 9), path(4, 9), path(5, 9, cache="other")])
        asked = [hash_part(number) for number in (2, 3, 7)]
        assert await catalog.remove_dangling("main", asked) == {hash_part(3)}
        assert [record.hash_part for record in await scanned(catalog)] == [hash_part(n) for n in (1, 2, 4)]
        assert len(await scanned(catalog, "other")) == 1
        assert await catalog.remove_dangling("main", []) == set()
