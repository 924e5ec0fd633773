"""What every catalog promises of what it keeps and lets go, as tests: see `tests.contracts.catalog_contract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.catalog.retention import (
    MAINTENANCE,
    Generation,
    Keeper,
    PathSummary,
    PathUse,
    PinRecord,
    Reliance,
    Removal,
    RemovalRecord,
    Removed,
    UnusedNar,
)
from cachesrv.errors import BeingRemoved, LockLost, MissingNar, MissingReferences, NotFound
from tests.contracts.catalog_contract import (
    NOW,
    Fixtures,
    base_name,
    hash_part,
    nar,
    nar_hash,
    path,
    refusal,
    scanned,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cachesrv.catalog.base import Catalog

HOLDER = "the collector"


def objects(part: str) -> list[str]:
    return [f"main/{part}.narinfo", f"main/{part}.ls"]


def removal(**fields: Any) -> Removal:
    given = {"cache": "main", "objects": objects, "holder": HOLDER, "by": "gc", "at": NOW}
    given["reason"] = lambda path: f"{path.name} is not used"
    return Removal(**{**given, **fields})


async def lock(catalog: Catalog, holder: str = HOLDER) -> None:
    assert await catalog.lock(MAINTENANCE, holder, now=NOW, until=NOW + 60) == holder


async def remove(catalog: Catalog, *paths: int, **fields: Any) -> Removed:
    await lock(catalog)
    numbers = await numbers_of(catalog, paths, fields.get("cache", "main"))
    return await catalog.remove_unneeded(removal(**fields), numbers.values())


async def numbers_of(catalog: Catalog, paths: Iterable[int], cache: str = "main") -> dict[int, int]:
    """The catalog's numbers of the paths that tests know by theirs."""
    found = await catalog.numbers(cache, [hash_part(number) for number in paths])
    return {int(part): number for part, number in found.items()}


async def left(catalog: Catalog, cache: str = "main") -> list[int]:
    return [int(record.hash_part) for record in await scanned(catalog, cache)]


def gone(removed: Removed) -> list[int]:
    return sorted(int(summary.hash_part) for summary in removed.gone)


class PinContract(Fixtures):
    async def test_a_pin_points_to_a_published_path(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2, cache="other")])
        for wrong in (base_name(2), f"{hash_part(1)}-other-name"):
            with pytest.raises(NotFound, match="push it first"):
                await self.point(catalog, wrong)
        assert await catalog.pins("main") == []
        await self.point(catalog, base_name(1))
        assert await catalog.pins("main") == [
            PinRecord("main", "release", 1, None, (Generation(base_name(1), NOW, "ann"),))
        ]
        assert await catalog.pinned("main", NOW) == set((await numbers_of(catalog, [1])).values())
        assert await catalog.pinned("other", NOW) == set()

    async def test_the_latest_generations_are_kept(self, catalog: Catalog) -> None:
        await catalog.publish([path(number) for number in range(5)])
        for number in (0, 1, 2, 3):
            await self.point(catalog, base_name(number), keep=3, at=NOW + number)
        assert await self.generations(catalog) == [3, 2, 1]
        await self.point(catalog, base_name(3), keep=2, at=NOW + 4, expires_at=NOW + 9)
        (record,) = await catalog.pins("main")
        assert record.generations == tuple(Generation(base_name(n), NOW + n, "ann") for n in (3, 2))
        assert (record.keep, record.expires_at) == (2, NOW + 9)
        await self.point(catalog, base_name(2), keep=2)
        assert await self.generations(catalog) == [2, 3]
        assert await catalog.pinned("main", NOW) == set((await numbers_of(catalog, [2, 3])).values())

    async def test_an_expired_pin_keeps_nothing(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        await self.point(catalog, base_name(1), expires_at=NOW + 10)
        assert len(await catalog.pinned("main", NOW + 9)) == 1
        assert await catalog.pinned("main", NOW + 10) == set()
        assert len(await catalog.pins("main")) == 1

    async def test_pins_come_by_name_and_go_by_name(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(1, cache="other")])
        await self.point(catalog, base_name(1), name="b")
        await self.point(catalog, base_name(1), name="a")
        await catalog.pin("other", "a", base_name(1), keep=1, expires_at=None, at=NOW, by="ann")
        assert [record.name for record in await catalog.pins("main")] == ["a", "b"]
        assert await catalog.unpin("main", "a") is True
        assert await catalog.unpin("main", "a") is False
        assert [record.name for record in await catalog.pins("main")] == ["b"]
        assert [record.name for record in await catalog.pins("other")] == ["a"]

    async def point(
        self,
        catalog: Catalog,
        target: str,
        *,
        name: str = "release",
        keep: int = 1,
        at: int = NOW,
        expires_at: int | None = None,
    ) -> None:
        await catalog.pin("main", name, target, keep=keep, expires_at=expires_at, at=at, by="ann")

    async def generations(self, catalog: Catalog) -> list[int]:
        (record,) = await catalog.pins("main")
        return [int(generation.base_name[:32]) for generation in record.generations]


class MarkingContract(Fixtures):
    async def test_uses_come_by_number_with_the_later_of_both_times(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2, registered_at=NOW + 50), path(3), path(4, cache="other")])
        await catalog.touch("main", {hash_part(1): NOW + 5, hash_part(2): NOW + 6})
        await catalog.lease("main", [hash_part(3)], NOW + 100)
        numbers = await numbers_of(catalog, [1, 2, 3])
        expected = [
            PathUse(numbers[1], NOW + 5, leased=False, file_size=101),
            PathUse(numbers[2], NOW + 50, leased=False, file_size=102),
            PathUse(numbers[3], NOW, leased=True, file_size=103),
        ]
        expected.sort(key=lambda use: use.number)
        assert await catalog.uses("main", NOW) == expected
        assert await catalog.uses("main", NOW, expected[0].number) == expected[1:]
        assert await catalog.uses("main", NOW, expected[-1].number) == []
        assert all(use.leased is False for use in await catalog.uses("main", NOW + 100))

    async def test_who_comes_for_a_nar_uses_all_paths_that_have_it(self, catalog: Catalog) -> None:
        same = {"nar_key": "main/nar/same.nar.zst"}
        await catalog.publish([path(1, **same), path(2, **same), path(3), path(1, cache="other", **same)])
        for at in (NOW + 5, NOW + 3):
            await catalog.touch_nars([same["nar_key"], "main/nar/none"], at)
        numbers = await numbers_of(catalog, [1, 2, 3])
        used = {use.number: use.used_at for use in await catalog.uses("main", NOW)}
        assert used == {numbers[1]: NOW + 5, numbers[2]: NOW + 5, numbers[3]: NOW}
        assert [use.used_at for use in await catalog.uses("other", NOW)] == [NOW + 5]

    async def test_what_paths_refer_to_comes_once(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 1, 3, 9), path(2, 3, 4), path(3), path(4)])
        numbers = await numbers_of(catalog, range(10))
        found = await catalog.referred([numbers[1], numbers[2], 10**6])
        assert len(found) == len(set(found)) == 4
        assert {numbers[1], numbers[3], numbers[4]} < set(found)
        assert await catalog.referred([]) == []
        assert set(await catalog.referring([numbers[3], numbers[4], 10**6])) == {numbers[1], numbers[2]}
        assert await catalog.referring([numbers[2]]) == []
        many = [path(number, 3) for number in range(100, 5_000)]
        await catalog.publish(many)
        assert await catalog.referred([use.number for use in await catalog.uses("main", NOW)][-4_900:]) == [numbers[3]]

    async def test_twins_have_their_nar_from_the_first(self, catalog: Catalog) -> None:
        same = {"nar_key": "main/nar/same.nar.zst"}
        await catalog.publish([path(1, **same), path(2), path(3, **same), path(4, **same)])
        await catalog.publish([path(2, cache="other", nar_key=path(2).nar_key)])
        first, *rest = sorted((await numbers_of(catalog, [1, 3, 4])).values())
        assert await catalog.twins("main") == dict.fromkeys(rest, first)

    async def test_summaries_say_what_there_is_to_say(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 2), path(3, cache="other")])
        await catalog.touch("main", {hash_part(1): NOW + 5})
        number = (await numbers_of(catalog, [1]))[1]
        (other,) = (await numbers_of(catalog, [3], "other")).values()
        assert await catalog.summaries("main", [number, other, 10**6]) == [
            PathSummary(number, hash_part(1), "package-1", "main/nar/1.nar.zst", 101, NOW + 5)
        ]


class RemovalContract(Fixtures):
    async def test_a_path_goes_with_its_objects_and_is_remembered(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 1, 2, 9), path(2)])
        numbers = await numbers_of(catalog, [1, 2])
        removed = await remove(catalog, 1, by="nightly")
        (summary,) = removed.gone
        assert (summary.number, summary.base_name) == (numbers[1], base_name(1))
        assert removed == Removed([summary], {}, {numbers[2]}, objects(hash_part(1)))
        assert await left(catalog) == [2]
        assert await catalog.removal("main", hash_part(2)) is None
        record = RemovalRecord(
            "main", hash_part(1), "package-1", nar_hash(1), "package-1 is not used", by="nightly", at=NOW
        )
        assert await catalog.removal("main", hash_part(1)) == record
        assert await catalog.removals("main", NOW) == [record]
        assert await catalog.removals("main", NOW + 1) == []
        assert await catalog.removals("other", NOW) == []
        await catalog.forget_removals(NOW)
        assert await catalog.removal("main", hash_part(1)) == record
        await catalog.forget_removals(NOW + 1)
        assert await catalog.removal("main", hash_part(1)) is None

    async def test_of_a_path_that_went_twice_the_last_time_is_remembered(self, catalog: Catalog) -> None:
        for at in (NOW, NOW + 5):
            await catalog.publish([path(1)])
            await catalog.settle((await remove(catalog, 1, at=at)).doomed)
        assert [record.at for record in await catalog.removals("main", 0)] == [NOW + 5]

    async def test_what_others_refer_to_stays_and_all_that_it_refers_to(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 2), path(2, 3), path(3, 3, 4), path(4), path(5)])
        numbers = await numbers_of(catalog, range(6))
        removed = await remove(catalog, 2, 3, 4, 5)
        assert gone(removed) == [5]
        assert removed.kept == {numbers[n]: Keeper.REFERRER for n in (2, 3, 4)}
        assert await left(catalog) == [1, 2, 3, 4]
        assert gone(await remove(catalog, 1, 2, 3)) == [1, 2, 3]
        assert await left(catalog) == [4]

    async def test_paths_that_refer_to_each_other_go_together(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 2), path(2, 1), path(3, 2)])
        assert gone(await remove(catalog, 1, 2)) == []
        assert gone(await remove(catalog, 1, 2, 3)) == [1, 2, 3]

    async def test_all_go_before_what_they_refer_to(self, catalog: Catalog) -> None:
        """Whatever their order in the catalog is; a fan, a chain, one that refers to itself, two to each other."""
        references = {1: [5], 5: [3], 3: [2, 3], 2: [4], 6: [3, 4], 7: [8, 4], 8: [7]}
        await catalog.publish([path(number, *references.get(number, [])) for number in range(9)])
        removed = await remove(catalog, *range(9))
        place = {int(summary.hash_part): at for at, summary in enumerate(removed.gone)}
        assert len(place) == 9
        late = {(7, 8), (8, 7), (7, 4)}
        edges = {(path, other) for path, others in references.items() for other in others if path != other}
        assert [edge for edge in edges - late if place[edge[0]] > place[edge[1]]] == []
        assert removed.doomed == [key for summary in removed.gone for key in objects(summary.hash_part)]
        assert await catalog.doomed() == removed.doomed
        await catalog.settle(removed.doomed[:5])
        assert await catalog.doomed() == removed.doomed[5:]

    async def test_what_is_pinned_leased_or_in_use_stays(self, catalog: Catalog) -> None:
        await catalog.publish([path(number) for number in range(5)])
        await catalog.pin("main", "release", base_name(1), keep=1, expires_at=None, at=NOW, by="ann")
        await catalog.lease("main", [hash_part(2)], NOW + 10)
        await catalog.touch("main", {hash_part(3): NOW + 7})
        numbers = await numbers_of(catalog, range(5))
        removed = await remove(catalog, *range(5), used_before=NOW + 7)
        assert gone(removed) == [0, 4]
        assert removed.kept == {numbers[1]: Keeper.PIN, numbers[2]: Keeper.LEASE, numbers[3]: Keeper.USE}
        assert gone(await remove(catalog, 1, 2, 3, used_before=NOW + 8, at=NOW + 9)) == [3]
        assert gone(await remove(catalog, 1, 2, at=NOW + 9)) == []
        assert gone(await remove(catalog, 1, 2, despite_leases=True)) == [2]
        await catalog.unpin("main", "release")
        assert gone(await remove(catalog, 1)) == [1]

    async def test_a_lease_is_never_shortened(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        await catalog.lease("main", [hash_part(1), hash_part(2)], NOW + 10)
        await catalog.lease("main", [hash_part(1)], NOW + 5)
        assert gone(await remove(catalog, 1, at=NOW + 9)) == []
        assert gone(await remove(catalog, 1, at=NOW + 10)) == [1]

    async def test_objects_stay_while_a_sibling_has_the_path(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2), path(1, cache="twin"), path(2, cache="stranger")])
        removed = await remove(catalog, 1, 2, siblings=["twin"])
        assert removed.doomed == objects(hash_part(2))
        assert await left(catalog, "twin") == [1]

    async def test_numbers_of_other_caches_and_of_nothing_are_passed_over(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, cache="other")])
        await lock(catalog)
        (number,) = (await numbers_of(catalog, [1], "other")).values()
        assert await catalog.remove_unneeded(removal(), [number, 10**6]) == Removed([], {}, set(), [])
        assert await catalog.remove_unneeded(removal(), []) == Removed([], {}, set(), [])
        assert await left(catalog, "other") == [1]

    async def test_only_who_holds_the_lock_removes(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        numbers = (await numbers_of(catalog, [1])).values()
        with pytest.raises(LockLost):
            await catalog.remove_unneeded(removal(), numbers)
        await lock(catalog, "another")
        with pytest.raises(LockLost, match="another"):
            await catalog.remove_unneeded(removal(), numbers)
        with pytest.raises(LockLost, match="another"):
            await catalog.doom([nar(1).key], holder=HOLDER, before=NOW, now=NOW)
        assert await left(catalog) == [1]


class RelianceContract(Fixtures):
    async def test_what_a_push_relies_on_has_to_be_there(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        await catalog.put_nar(nar(2))
        relying = Reliance(references={"main": [hash_part(2)]})
        with pytest.raises(MissingReferences, match=hash_part(2)):
            await catalog.publish([path(1, 2)], relying)
        with pytest.raises(MissingReferences, match=hash_part(2)):
            await catalog.publish([path(1, 2), path(2, cache="other")], relying)
        assert await scanned(catalog) == []
        await catalog.publish([path(1, 2), path(2)], relying)
        await catalog.publish([path(1, 2)], relying)
        with pytest.raises(MissingNar, match=r"nar/3\.nar\.zst"):
            await catalog.publish([path(3)], Reliance())
        await catalog.publish([path(3)])
        assert await left(catalog) == [1, 2, 3]

    async def test_what_is_being_removed_is_not_published(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        doomed = (await remove(catalog, 1)).doomed
        assert await catalog.doomed() == doomed
        with pytest.raises(BeingRemoved, match="try again"):
            await catalog.publish([path(1)], Reliance(objects=objects(hash_part(1))))
        with pytest.raises(BeingRemoved, match="try again"):
            await catalog.fence(["main/other", *objects(hash_part(1))])
        before = await catalog.fence(["main/other"])
        await catalog.settle(doomed)
        assert await catalog.doomed() == []
        assert await catalog.fence(objects(hash_part(1))) == before + 1
        await catalog.put_nar(nar(1))
        assert await catalog.publish([path(1)], Reliance(objects=objects(hash_part(1)))) == before + 1

    async def test_a_doomed_nar_is_neither_noted_nor_published_until_it_is_settled(self, catalog: Catalog) -> None:
        assert await catalog.put_nar(nar(1)) == 0
        await lock(catalog)
        assert await self.doom(catalog, 1) == [nar(1).key]
        assert await catalog.nar(nar(1).key) is None
        with pytest.raises(BeingRemoved):
            await catalog.put_nar(nar(1))
        with pytest.raises(BeingRemoved):
            await catalog.put_nars([nar(2), nar(1)])
        assert await catalog.nar(nar(2).key) is None
        with pytest.raises(BeingRemoved):
            await catalog.publish([path(1)])
        await catalog.settle([nar(1).key])
        assert await catalog.put_nar(nar(1)) == 1
        await catalog.publish([path(1)])

    async def test_to_push_a_path_again_is_to_use_it(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        await catalog.publish([path(1)], Reliance())
        for again, reliance, used_at in (
            (NOW + 3600, Reliance(), NOW),
            (NOW + 3601, None, NOW),
            (NOW + 3601, Reliance(), NOW + 3601),
            (NOW, Reliance(), NOW + 3601),
        ):
            await catalog.publish([path(1, registered_at=again)], reliance)
            assert [use.used_at for use in await catalog.uses("main", NOW)] == [used_at]

    async def test_who_published_first_is_remembered(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, pusher="ann")])
        await catalog.publish([path(1, pusher="bob", narinfo=b"changed")])
        assert [record.pusher for record in await scanned(catalog)] == ["ann"]
        await catalog.record_conflicts([refusal(1, publisher="ann")])
        assert [record.publisher for record in await catalog.conflicts("main")] == ["ann"]

    async def doom(self, catalog: Catalog, *numbers: int, before: int = NOW + 1, now: int = NOW) -> list[str]:
        return await catalog.doom([nar(n).key for n in numbers], holder=HOLDER, before=before, now=now)


class UnusedNarContract(RelianceContract):
    async def test_a_nar_is_unused_when_it_was_long_here_or_long_ago_let_go(self, catalog: Catalog) -> None:
        for number in range(1, 5):
            await catalog.put_nar(nar(number))
        await catalog.publish([path(1), path(2)])
        await remove(catalog, 2, at=NOW + 50)
        await catalog.lease_nars("main", [nar_hash(4)], NOW + 20)
        assert await self.unused(catalog, NOW) == []
        assert await self.unused(catalog, NOW + 1) == [(3, NOW)]
        assert await self.unused(catalog, NOW + 1, now=NOW + 20) == [(3, NOW), (4, NOW)]
        assert await self.unused(catalog, NOW + 51) == [(2, NOW + 50), (3, NOW)]
        assert await self.unused(catalog, NOW + 51, after=2) == [(3, NOW)]
        assert await catalog.unused_nars("mai", NOW + 51, NOW) == []

    async def test_a_nar_that_another_path_needs_is_in_use_wherever_that_is(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        await catalog.publish([path(1), path(2, nar_key=nar(1).key), path(3, cache="twin", nar_key=nar(1).key)])
        await lock(catalog)
        for number, cache in ((1, "main"), (2, "main"), (3, "twin")):
            assert await self.unused(catalog, NOW + 1) == []
            assert await self.doom(catalog, 1) == []
            await remove(catalog, number, cache=cache)
        assert await self.unused(catalog, NOW + 1) == [(1, NOW)]
        assert await self.doom(catalog, 1) == [nar(1).key]
        assert await self.unused(catalog, NOW + 1) == []

    async def test_a_nar_without_a_record_is_unused_after_its_path(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2)])
        await remove(catalog, 1, 2, at=NOW + 5)
        assert await self.unused(catalog, NOW + 5) == []
        assert await self.unused(catalog, NOW + 6) == [(1, NOW + 5), (2, NOW + 5)]
        assert await self.unused(catalog, NOW + 6, after=1) == [(2, NOW + 5)]
        await catalog.publish([path(1)])
        assert await self.unused(catalog, NOW + 6) == [(2, NOW + 5)]
        assert await self.doom(catalog, 1, 2, before=NOW + 5) == []
        assert await self.doom(catalog, 1, 2, before=NOW + 6) == [path(2).nar_key]

    async def test_a_stray_nar_becomes_garbage_when_it_is_noted(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2)])
        await remove(catalog, 2)
        await catalog.put_nar(nar(3))
        await catalog.doom([nar(4).key], holder=HOLDER, before=NOW, now=NOW)
        keys = {nar(number).key for number in range(1, 7)}
        assert await catalog.stray_nars(keys) == {nar(5).key, nar(6).key}
        assert await self.unused(catalog, NOW + 9) == [(2, NOW), (3, NOW)]
        assert await catalog.release_strays(keys - {nar(6).key}, NOW + 4) == {nar(5).key}
        assert await catalog.stray_nars(keys) == {nar(6).key}
        assert await self.unused(catalog, NOW + 9) == [(2, NOW), (3, NOW), (5, NOW + 4)]

    async def test_a_damaged_nar_goes_whatever_protects_it_but_a_path(self, catalog: Catalog) -> None:
        for number in (1, 2):
            await catalog.put_nar(nar(number), leased_until=NOW + 100)
        await catalog.publish([path(1)])
        keys = [nar(1).key, nar(2).key, nar(3).key]
        with pytest.raises(LockLost):
            await catalog.doom_damaged(keys, holder="another")
        await lock(catalog)
        assert await catalog.doom_damaged(keys, holder=HOLDER) == keys[1:]
        assert await catalog.nar(nar(2).key) is None
        assert await catalog.nar(nar(1).key) is not None
        assert await catalog.doomed() == keys[1:]

    async def test_objects_of_what_is_not_published_can_be_doomed(self, catalog: Catalog) -> None:
        await catalog.publish([path(1), path(2, cache="twin")])
        lying = {hash_part(number): objects(hash_part(number)) for number in (1, 2, 3)}
        with pytest.raises(LockLost):
            await catalog.doom_unpublished(["main", "twin"], lying, holder="another")
        await lock(catalog)
        doomed = await catalog.doom_unpublished(["main", "twin"], lying, holder=HOLDER)
        assert sorted(doomed) == sorted(objects(hash_part(3)))
        with pytest.raises(BeingRemoved):
            await catalog.publish([path(3)], Reliance(objects=objects(hash_part(3))))

    async def test_pins_can_be_passed_over(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        await catalog.pin("main", "release", base_name(1), keep=1, expires_at=None, at=NOW, by="ann")
        assert gone(await remove(catalog, 1)) == []
        assert gone(await remove(catalog, 1, despite_pins=True)) == [1]

    async def test_only_what_is_still_unused_is_doomed(self, catalog: Catalog) -> None:
        await lock(catalog)
        await catalog.put_nar(nar(1))
        await catalog.put_nar(nar(2))
        await catalog.lease_nars("main", [nar_hash(2)], NOW + 10)
        assert await self.doom(catalog, 1, 2, 3, before=NOW) == [nar(3).key]
        assert await self.doom(catalog, 1, 2, 3) == [nar(1).key, nar(3).key]
        assert await self.doom(catalog, 2, now=NOW + 10) == [nar(2).key]
        assert await catalog.doomed() == [nar(number).key for number in (3, 1, 2)]
        assert await self.doom(catalog) == []

    async def test_a_lease_outlasts_a_second_upload(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        await catalog.lease_nars("main", [nar_hash(1)], NOW + 10)
        await catalog.put_nar(nar(1, file_size=77))
        await catalog.put_nar(nar(1, file_size=77), leased_until=NOW + 5)
        assert await self.unused(catalog, NOW + 1, now=NOW + 9) == []
        await catalog.put_nar(nar(1, file_size=77), leased_until=NOW + 15)
        assert await self.unused(catalog, NOW + 1, now=NOW + 14) == []
        assert await self.unused(catalog, NOW + 1, now=NOW + 15) == [(1, NOW)]

    async def unused(self, catalog: Catalog, before: int, now: int = NOW, after: int = 0) -> list[tuple[int, int]]:
        found = await catalog.unused_nars("main", before, now, nar(after).key if after else "")
        for one in found:
            assert isinstance(one, UnusedNar)
        return [(int(one.key.split("/")[2].split(".")[0]), one.unused_since) for one in found]


class LockContract(Fixtures):
    async def test_one_holds_a_lock_until_it_ends_or_is_given_back(self, catalog: Catalog) -> None:
        assert await self.take(catalog, "one", NOW) == "one"
        assert await self.take(catalog, "two", NOW + 9) == "one"
        assert await self.take(catalog, "one", NOW + 9) == "one"
        assert await self.take(catalog, "two", NOW + 18) == "one"
        assert await self.take(catalog, "two", NOW + 19) == "two"
        await catalog.unlock("work", "one")
        assert await self.take(catalog, "one", NOW + 20) == "two"
        await catalog.unlock("work", "two")
        assert await self.take(catalog, "one", NOW + 20) == "one"
        assert await catalog.lock("other work", "two", now=NOW, until=NOW + 1) == "two"

    async def test_a_lock_can_be_taken_over_from_a_holder_that_is_named(self, catalog: Catalog) -> None:
        await self.take(catalog, "dead", NOW)
        assert await self.take(catalog, "two", NOW, in_place_of="another") == "dead"
        assert await self.take(catalog, "two", NOW, in_place_of="dead") == "two"

    async def test_notes_are_kept(self, catalog: Catalog) -> None:
        assert await catalog.noted("x") is None
        await catalog.note("x", "1")
        await catalog.note("x", "2")
        await catalog.note("y", "")
        assert (await catalog.noted("x"), await catalog.noted("y")) == ("2", "")

    async def take(self, catalog: Catalog, holder: str, now: int, in_place_of: str | None = None) -> str:
        return await catalog.lock("work", holder, now=now, until=now + 10, in_place_of=in_place_of)


class RetentionContract(PinContract, MarkingContract, RemovalContract, UnusedNarContract, LockContract):
    """All of it."""


def reachable(graph: dict[int, Collection[int]], roots: Collection[int]) -> set[int]:
    """The closure of `roots` among the keys of `graph`."""
    found: set[int] = set()
    ahead = [root for root in roots if root in graph]
    while ahead:
        number = ahead.pop()
        if number not in found:
            found.add(number)
            ahead += [target for target in graph[number] if target in graph]
    return found
