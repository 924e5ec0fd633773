"""What every catalog promises, as tests: a subclass gives the fixture `open_catalog`, a state machine its catalog."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachesrv.catalog import refused
from cachesrv.catalog.base import ConflictRecord, NarRecord, PathRecord, RefusalRecord, TokenRecord
from cachesrv.errors import BadInput, Conflict, StoreUnavailable

if TYPE_CHECKING:
    from cachesrv.catalog.base import Catalog

NOW = 1_700_000_000

# Opens the same catalog each time, as another process would.
OpenCatalog = Callable[[], Awaitable["Catalog"]]


def hash_part(number: int) -> str:
    """Ordered as the numbers are."""
    return f"{number:032d}"


def base_name(number: int) -> str:
    return f"{hash_part(number)}-package-{number}"


def nar_hash(number: int) -> str:
    return f"sha256:{number:052d}"


def path(number: int, *references: int, cache: str = "main", **fields: Any) -> PathRecord:
    record = PathRecord(
        cache=cache,
        hash_part=hash_part(number),
        name=f"package-{number}",
        narinfo=f"StorePath: /nix/store/{base_name(number)}\n".encode(),
        nar_key=f"{cache}/nar/{number}.nar.zst",
        nar_hash=nar_hash(number),
        nar_size=1000 + number,
        file_size=100 + number,
        references=tuple(base_name(reference) for reference in references),
        deriver=f"{hash_part(0)}-package-{number}.drv",
        ca=None,
        registered_at=NOW,
    )
    return replace(record, **fields)


def nar(number: int, **fields: Any) -> NarRecord:
    record = NarRecord(
        key=f"main/nar/{number}.nar.zst",
        scope="main",
        compression="zstd",
        file_hash=nar_hash(number + 1000),
        file_size=number,
        nar_hash=nar_hash(number),
        nar_size=2 * number,
        listing=b"\x28\xb5\x2f\xfd\x00",
        verified_at=NOW,
    )
    return replace(record, **fields)


def refusal(number: int, **fields: Any) -> ConflictRecord:
    record = ConflictRecord(
        cache="main",
        hash_part=hash_part(number),
        name=f"package-{number}",
        published_nar_hash=nar_hash(number),
        refused_nar_hash=nar_hash(number + 1),
        pusher="builder",
        at=NOW,
    )
    return replace(record, **fields)


def token(name: str, number: int, **fields: Any) -> TokenRecord:
    record = TokenRecord(
        name=name,
        sha256=f"{number:064x}",
        caches=("main", "team-*"),
        permissions=("pull", "push"),
        created_at=NOW,
        expires_at=NOW + 3600,
        revoked_at=None,
    )
    return replace(record, **fields)


async def scanned(catalog: Catalog, cache: str = "main", after: str = "") -> list[PathRecord]:
    return [record async for record in catalog.scan(cache, after)]


class Fixtures:
    @pytest.fixture
    async def catalog(self, open_catalog: OpenCatalog) -> Catalog:
        return await open_catalog()


class PublishContract(Fixtures):
    async def test_a_published_path_is_found_by_all_ways(self, catalog: Catalog) -> None:
        record = path(1, 1, 2, 3)
        assert await catalog.path("main", hash_part(1)) is None
        await catalog.publish([record])
        assert await catalog.path("main", hash_part(1)) == record
        assert await catalog.paths("main", [hash_part(1), hash_part(2)]) == {hash_part(1): record}
        assert await catalog.present("main", [hash_part(1), hash_part(2)]) == {hash_part(1)}
        assert await catalog.nar_hashes("main", [hash_part(1), hash_part(2)]) == {hash_part(1): record.nar_hash}
        assert await scanned(catalog) == [record]
        assert await catalog.count("main") == (1, 1001)

    async def test_any_bytes_and_the_largest_numbers_come_back(self, catalog: Catalog) -> None:
        record = path(1, narinfo=bytes(range(256)), nar_size=2**63 - 1, file_size=0, deriver=None, ca="text:sha256:1")
        await catalog.publish([record])
        assert await catalog.path("main", hash_part(1)) == record

    async def test_references_come_back_sorted_and_each_once(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 9, 2, 9, 5)])
        assert await catalog.path("main", hash_part(1)) == path(1, 2, 5, 9)

    async def test_caches_know_nothing_of_each_other(self, catalog: Catalog) -> None:
        mine, theirs = path(1, 2, cache="mine"), path(1, 3, cache="theirs", nar_hash=nar_hash(7))
        await catalog.publish([theirs, mine])
        assert await catalog.path("mine", hash_part(1)) == mine
        assert await catalog.path("theirs", hash_part(1)) == theirs
        assert await catalog.referrers("mine", hash_part(3)) == set()
        await catalog.remove("theirs", [hash_part(1)])
        assert await scanned(catalog, "mine") == [mine]
        assert await scanned(catalog, "theirs") == []

    async def test_to_publish_again_changes_nothing(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 2)])
        await catalog.publish([path(1, 2, registered_at=NOW + 60)])
        assert await scanned(catalog) == [path(1, 2)]

    @pytest.mark.parametrize(
        "change",
        [
            {"narinfo": b"with another signature"},
            {"nar_key": "main/nar/again.nar.xz", "file_size": 7},
            {"nar_size": 5},
            {"deriver": None},
            {"ca": "fixed:r:sha256:1"},
            {"references": ()},
            {"references": (base_name(1), base_name(3))},
            {"references": (base_name(2), base_name(3)), "narinfo": b"both"},
        ],
    )
    async def test_what_may_change_is_updated(self, catalog: Catalog, change: dict[str, Any]) -> None:
        await catalog.publish([path(1, 2), path(4, 2)])
        await catalog.publish([path(1, 2, **change)])
        assert await scanned(catalog) == [path(1, 2, **change), path(4, 2)]

    @pytest.mark.parametrize("change", [{"nar_hash": nar_hash(8)}, {"name": "other"}])
    async def test_another_nar_or_name_is_refused_and_nothing_of_its_batch_written(
        self, catalog: Catalog, change: dict[str, Any]
    ) -> None:
        await catalog.publish([path(1), path(2)])
        with pytest.raises(Conflict):
            await catalog.publish([path(0, 5), path(1, narinfo=b"new"), path(2, **change), path(3)])
        assert await scanned(catalog) == [path(1), path(2)]
        assert await catalog.referrers("main", hash_part(5)) == set()

    async def test_a_conflict_names_the_path_and_both_hashes(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        with pytest.raises(Conflict) as refused:
            await catalog.publish([path(1, nar_hash=nar_hash(8))])
        message = str(refused.value)
        assert base_name(1) in message
        assert message.index(nar_hash(1)) < message.index(nar_hash(8))
        assert "\n" not in message

    async def test_a_batch_may_not_contradict_itself(self, catalog: Catalog) -> None:
        with pytest.raises(Conflict):
            await catalog.publish([path(1), path(1, nar_hash=nar_hash(8))])
        assert await scanned(catalog) == []

    async def test_of_a_path_twice_in_a_batch_the_last_counts(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 2), path(1, 3, narinfo=b"last")])
        assert await scanned(catalog) == [path(1, 3, narinfo=b"last")]

    @pytest.mark.parametrize(
        "bad",
        [
            {"references": ("nohash",)},
            {"references": (f"{hash_part(3)}-",)},
            {"nar_size": 2**63},
            {"deriver": "\ud800"},
        ],
    )
    async def test_values_that_cannot_be_stored_are_bad_input(self, catalog: Catalog, bad: dict[str, Any]) -> None:
        with pytest.raises(BadInput):
            await catalog.publish([path(1), path(2, **bad)])
        assert await scanned(catalog) == []

    async def test_empty_batches_are_fine(self, catalog: Catalog) -> None:
        await catalog.publish([])
        await catalog.remove("main", [])
        await catalog.touch("main", {})
        await catalog.remove_nars([])
        assert await catalog.paths("main", []) == {}
        assert await catalog.present("main", []) == set()
        assert await catalog.nar_hashes("main", []) == {}
        assert await catalog.nars_by_hash("main", []) == {}

    async def test_removed_paths_are_gone_and_may_come_back_different(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 1, 2), path(2), path(3, 2)])
        await catalog.remove("main", [hash_part(1), hash_part(3), hash_part(9)])
        assert await scanned(catalog) == [path(2)]
        assert await catalog.referrers("main", hash_part(2)) == set()
        assert await catalog.count("main") == (1, 1002)
        await catalog.publish([path(1, 4, nar_hash=nar_hash(8))])
        assert await scanned(catalog) == [path(1, 4, nar_hash=nar_hash(8)), path(2)]

    async def test_a_removed_path_stays_the_reference_of_others(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 2), path(2)])
        await catalog.remove("main", [hash_part(2)])
        assert await scanned(catalog) == [path(1, 2)]
        assert await catalog.referrers("main", hash_part(2)) == {hash_part(1)}

    async def test_a_published_path_may_be_touched_and_others_are_passed_over(self, catalog: Catalog) -> None:
        await catalog.publish([path(1)])
        await catalog.touch("main", {hash_part(1): NOW, hash_part(2): NOW})
        assert await scanned(catalog) == [path(1)]


class LookupContract(Fixtures):
    async def test_batches_have_no_limit(self, catalog: Catalog) -> None:
        records = [path(number, 0, number, number + 1) for number in range(1, 2_501)]
        await catalog.publish(records)
        asked = [hash_part(number) for number in range(1, 20_000, 2)]
        assert await catalog.present("main", asked) == {record.hash_part for record in records[::2]}
        assert await catalog.nar_hashes("main", asked) == {one.hash_part: one.nar_hash for one in records[::2]}
        assert await catalog.paths("main", asked) == {record.hash_part: record for record in records[::2]}
        assert await scanned(catalog) == records
        assert len(await catalog.referrers("main", hash_part(0))) == 2_500
        await catalog.touch("main", dict.fromkeys(asked, NOW))
        await catalog.remove("main", asked)
        assert await scanned(catalog) == records[1::2]

    async def test_what_is_published_is_never_lacked(self, catalog: Catalog, open_catalog: OpenCatalog) -> None:
        other = await open_catalog()
        for number in range(20):
            catalog.lacks("main", hash_part(number))
            other.lacks("main", hash_part(number))
            await catalog.publish([path(number)])
            assert not catalog.lacks("main", hash_part(number))
            assert not other.lacks("main", hash_part(number))

    async def test_a_scan_begins_beyond_a_hash_part(self, catalog: Catalog) -> None:
        await catalog.publish([path(3), path(1), path(2)])
        assert await scanned(catalog, after=hash_part(1)) == [path(2), path(3)]
        assert await scanned(catalog, after=hash_part(3)) == []
        assert await scanned(catalog, "empty") == []

    async def test_a_scan_does_not_stand_in_the_way_of_writes(self, catalog: Catalog) -> None:
        await catalog.publish([path(number) for number in range(0, 4_000, 2)])
        seen = []
        async for record in catalog.scan("main"):
            seen.append(record.hash_part)
            if len(seen) == 1:
                await catalog.publish([path(3_999)])
                await catalog.remove("main", [hash_part(3_996)])
        assert seen == sorted(seen)
        assert len(seen) == len(set(seen)) == 2_000

    async def test_referrers_are_published_paths_of_the_cache_but_not_the_path_itself(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 1, 9), path(2, 1), path(3, 2), path(4, 1, cache="other")])
        assert await catalog.referrers("main", hash_part(1)) == {hash_part(2)}
        assert await catalog.referrers("main", hash_part(2)) == {hash_part(3)}
        assert await catalog.referrers("main", hash_part(9)) == {hash_part(1)}
        assert await catalog.referrers("main", hash_part(8)) == set()

    async def test_dangling_references_are_those_to_paths_that_are_not_published(self, catalog: Catalog) -> None:
        await catalog.publish([path(1, 1, 2), path(2, 7, 3), path(4, 3), path(5, 9, cache="other"), path(9)])
        await catalog.publish([path(3, 4), path(6, references=(f"{hash_part(2)}-wrong", base_name(5)))])
        expected = [
            (hash_part(2), base_name(7)),
            (hash_part(6), f"{hash_part(2)}-wrong"),
            (hash_part(6), base_name(5)),
        ]
        assert await catalog.dangling("main", 10) == expected
        assert await catalog.dangling("main", 2) == expected[:2]
        assert await catalog.dangling("other", 10) == [(hash_part(5), base_name(9))]
        await catalog.remove("main", [hash_part(2), hash_part(6)])
        assert await catalog.dangling("main", 10) == [(hash_part(1), base_name(2))]

    async def test_count_is_of_one_cache(self, catalog: Catalog) -> None:
        assert await catalog.count("main") == (0, 0)
        await catalog.publish([path(1), path(2), path(3, cache="other")])
        assert await catalog.count("main") == (2, 2003)


class NarContract(Fixtures):
    async def test_a_nar_is_found_by_key_and_by_hash(self, catalog: Catalog) -> None:
        assert await catalog.nar(nar(1).key) is None
        await catalog.put_nar(nar(1))
        await catalog.put_nar(nar(1))
        assert await catalog.nar(nar(1).key) == nar(1)
        assert await catalog.nars_by_hash("main", [nar_hash(1), nar_hash(2)]) == {nar_hash(1): nar(1, listing=None)}
        assert await catalog.nars_by_hash("other", [nar_hash(1)]) == {}

    async def test_one_with_the_same_key_is_replaced(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        again = nar(2, key=nar(1).key, listing=None, compression="xz", verified_at=NOW + 1)
        await catalog.put_nar(again)
        assert await catalog.nar(nar(1).key) == again
        assert await catalog.nars_by_hash("main", [nar_hash(1), nar_hash(2)]) == {nar_hash(2): again}

    async def test_several_are_put_together(self, catalog: Catalog) -> None:
        await catalog.put_nars([])
        await catalog.put_nar(nar(1))
        again = nar(2, compression="xz", verified_at=NOW + 1)
        await catalog.put_nar(nar(2))
        await catalog.put_nars([nar(1), again, *(nar(number) for number in range(3, 5_000))])
        assert [await catalog.nar(nar(number).key) for number in (1, 2, 3, 4_999, 5_000)] == [
            nar(1),
            again,
            nar(3),
            nar(4_999),
            None,
        ]

    async def test_of_several_with_one_hash_the_one_verified_first_is_given(self, catalog: Catalog) -> None:
        first = nar(1, key="main/nar/z.nar.zst", listing=None)
        second = nar(1, verified_at=NOW + 1)
        third = nar(1, key="main/nar/a.nar.zst", verified_at=NOW + 2)
        for record in (second, first, third):
            await catalog.put_nar(record)
        assert await catalog.nars_by_hash("main", [nar_hash(1)]) == {nar_hash(1): first}
        alike = [first, replace(second, listing=None), replace(third, listing=None)]
        assert await catalog.nars_alike("main", nar_hash(1)) == alike
        assert await catalog.nars_alike("other", nar_hash(1)) == []

    async def test_a_listing_goes_when_its_path_is_published(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        await catalog.put_nar(nar(2))
        await catalog.publish([path(1, nar_key=nar(1).key)])
        assert await catalog.nar(nar(1).key) == nar(1, listing=None)
        assert await catalog.nar(nar(2).key) == nar(2)

    async def test_listings_of_many(self, catalog: Catalog) -> None:
        await catalog.put_nars([nar(1), nar(2, listing=None), *(nar(number) for number in range(3, 5_000))])
        await catalog.publish([path(3, nar_key=nar(3).key)])
        listings = await catalog.listings([nar(number).key for number in range(5_001)])
        assert listings == {nar(number).key: nar(number).listing for number in range(1, 5_000) if number not in (2, 3)}
        assert await catalog.listings([]) == {}

    async def test_removed_nars_are_gone(self, catalog: Catalog) -> None:
        await catalog.put_nar(nar(1))
        await catalog.put_nar(nar(2))
        await catalog.remove_nars([nar(1).key, nar(3).key])
        assert await catalog.nar(nar(1).key) is None
        assert await catalog.nars_by_hash("main", [nar_hash(n) for n in range(5_000)]) == {
            nar_hash(2): nar(2, listing=None)
        }


class RefusalContract(Fixtures):
    async def test_refused_pushes_come_latest_first(self, catalog: Catalog) -> None:
        records = [refusal(2, at=NOW + 2), refusal(1, at=NOW + 3), refusal(1, refused_nar_hash=nar_hash(9))]
        await catalog.record_conflicts([*records, refusal(1, cache="other")])
        await catalog.record_conflicts([])
        assert await catalog.conflicts("main") == [records[1], records[0], records[2]]
        assert await catalog.conflicts("main", hash_part(1)) == [records[1], records[2]]
        assert await catalog.conflicts("main", hash_part(3)) == []

    async def test_the_same_one_again_counts_once_with_its_latest_time(self, catalog: Catalog) -> None:
        for at in (NOW, NOW + 5, NOW + 5, NOW + 1):
            await catalog.record_conflicts([refusal(1, at=at)])
        assert await catalog.conflicts("main") == [refusal(1, at=NOW + 5)]

    async def test_other_pushers_count_on_their_own(self, catalog: Catalog) -> None:
        await catalog.record_conflicts([refusal(1)])
        await catalog.record_conflicts([refusal(1, pusher="laptop", at=NOW + 1)])
        assert [record.pusher for record in await catalog.conflicts("main")] == ["laptop", "builder"]

    async def test_conflicts_are_remembered_in_limited_number(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refused, "MAX_CONFLICTS_OF_PATH", 3)
        monkeypatch.setattr(refused, "MAX_CONFLICTS", 5)
        for number in range(6):
            await catalog.record_conflicts([refusal(1, refused_nar_hash=nar_hash(number), at=NOW + number)])
        assert [record.at - NOW for record in await catalog.conflicts("main", hash_part(1))] == [5, 4, 3]
        await catalog.record_conflicts([refusal(number) for number in range(2, 6)])
        assert len(await catalog.conflicts("main")) == 5
        assert [record.at - NOW for record in await catalog.conflicts("main", hash_part(1))] == [5]

    async def test_of_a_path_that_was_refused_the_last_time_is_remembered(self, catalog: Catalog) -> None:
        first = RefusalRecord("main", hash_part(1), "package-1", "no signature", "ci", NOW)
        later = replace(first, reason="no NAR", pusher="ann", at=NOW + 1)
        others = [replace(first, hash_part=hash_part(2)), replace(first, cache="other")]
        await catalog.record_refusals([first, *others])
        assert await catalog.refusal("main", hash_part(1)) == first
        await catalog.record_refusals([later])
        assert await catalog.refusal("main", hash_part(1)) == later
        assert [await catalog.refusal(other.cache, other.hash_part) for other in others] == others
        assert await catalog.refusal("main", hash_part(3)) is None
        await catalog.record_refusals([])

    async def test_refusals_are_remembered_of_a_limited_number_of_paths(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refused, "MAX_REFUSALS", 3)
        record = RefusalRecord("main", hash_part(0), "package", "no signature", "ci", NOW)
        for number in (0, 1, 2, 0, 3, 4):
            await catalog.record_refusals([replace(record, hash_part=hash_part(number))])
        left = [number for number in range(5) if await catalog.refusal("main", hash_part(number))]
        assert left == [0, 3, 4]


class TokenContract(Fixtures):
    async def test_a_token_is_found_by_its_hash(self, catalog: Catalog) -> None:
        eternal = token("ci", 1, caches=("*",), permissions=(), expires_at=None)
        await catalog.put_token(eternal)
        await catalog.put_token(token("ann", 2))
        assert await catalog.token(eternal.sha256) == eternal
        assert await catalog.token("ff") is None
        assert await catalog.tokens() == [token("ann", 2), eternal]

    async def test_to_add_it_again_changes_nothing(self, catalog: Catalog) -> None:
        await catalog.put_token(token("ci", 1))
        await catalog.put_token(token("ci", 1))
        assert await catalog.tokens() == [token("ci", 1)]

    @pytest.mark.parametrize("other", [token("ci", 2), token("ci", 1, caches=("*",)), token("ann", 1)])
    async def test_a_name_or_a_secret_in_use_is_refused(self, catalog: Catalog, other: TokenRecord) -> None:
        await catalog.put_token(token("ci", 1))
        with pytest.raises(Conflict) as refused:
            await catalog.put_token(other)
        assert other.sha256 not in str(refused.value)
        assert await catalog.tokens() == [token("ci", 1)]

    async def test_a_revoked_token_stays_known_and_frees_its_name(self, catalog: Catalog) -> None:
        await catalog.put_token(token("ci", 1))
        assert await catalog.revoke_token("ci", NOW + 1) is True
        assert await catalog.revoke_token("ci", NOW + 2) is False
        assert await catalog.revoke_token("ann", NOW) is False
        assert await catalog.token(token("ci", 1).sha256) == token("ci", 1, revoked_at=NOW + 1)
        await catalog.put_token(token("ci", 2, created_at=NOW + 3))
        assert await catalog.revoke_token("ci", NOW + 4) is True
        assert [record.revoked_at for record in await catalog.tokens()] == [NOW + 1, NOW + 4]

    async def test_a_token_that_comes_revoked_may_have_a_name_in_use(self, catalog: Catalog) -> None:
        old = token("ci", 2, created_at=NOW - 1, revoked_at=NOW)
        await catalog.put_token(token("ci", 1))
        await catalog.put_token(old)
        assert await catalog.tokens() == [old, token("ci", 1)]

    async def test_a_revoked_secret_does_not_come_back(self, catalog: Catalog) -> None:
        await catalog.put_token(token("ci", 1))
        await catalog.revoke_token("ci", NOW + 1)
        with pytest.raises(Conflict):
            await catalog.put_token(token("ci", 1))


class SharingContract(Fixtures):
    async def test_others_see_at_once_what_one_has_written(self, open_catalog: OpenCatalog) -> None:
        one, other = await open_catalog(), await open_catalog()
        for number in range(20):
            await one.publish([path(number)])
            assert await other.present("main", [hash_part(number)]) == {hash_part(number)}
            await other.remove("main", [hash_part(number)])
            assert await one.path("main", hash_part(number)) is None

    async def test_it_outlives_those_who_wrote_it(self, open_catalog: OpenCatalog) -> None:
        one = await open_catalog()
        await one.publish([path(1, 2)])
        await one.put_nar(nar(1))
        await one.put_token(token("ci", 1))
        await one.record_conflicts([refusal(1)])
        await one.close()
        other = await open_catalog()
        assert await scanned(other) == [path(1, 2)]
        assert await other.nar(nar(1).key) == nar(1)
        assert await other.tokens() == [token("ci", 1)]
        assert await other.conflicts("main") == [refusal(1)]

    async def test_of_contradicting_pushes_at_once_one_wins(self, open_catalog: OpenCatalog) -> None:
        catalogs = [await open_catalog(), await open_catalog()]
        batches = [[path(n, 100 + n, nar_hash=nar_hash(1000 + push)) for n in range(20)] for push in range(8)]
        results = await asyncio.gather(
            *(catalogs[push % 2].publish(batch) for push, batch in enumerate(batches)), return_exceptions=True
        )
        (winner,) = (batch for batch, result in zip(batches, results, strict=True) if isinstance(result, int))
        assert sum(isinstance(result, Conflict) for result in results) == len(batches) - 1
        assert await scanned(catalogs[0]) == winner

    async def test_readers_see_batches_whole(self, open_catalog: OpenCatalog) -> None:
        one, other = await open_catalog(), await open_catalog()

        async def write() -> None:
            for number in range(0, 400, 20):
                await one.publish([path(n, n + 1) for n in range(number, number + 20)])

        writing = asyncio.create_task(write())
        while not writing.done():
            number, _ = await other.count("main")
            assert number % 20 == 0
        await writing

    async def test_a_cancelled_publish_is_done_whole_or_not_at_all(self, catalog: Catalog) -> None:
        for first in range(0, 1000, 100):
            publishing = asyncio.create_task(catalog.publish([path(n) for n in range(first, first + 100)]))
            await asyncio.sleep(first / 100_000)
            publishing.cancel()
        await catalog.publish([path(2_000)])
        number, _ = await catalog.count("main")
        assert number % 100 == 1

    async def test_a_closed_catalog_says_so(self, open_catalog: OpenCatalog) -> None:
        catalog = await open_catalog()
        await catalog.close()
        await catalog.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await catalog.path("main", hash_part(1))
        with pytest.raises(StoreUnavailable, match="closed"):
            await catalog.publish([path(1)])


class CatalogContract(PublishContract, LookupContract, NarContract, RefusalContract, TokenContract, SharingContract):
    """All of it."""


_numbers = st.integers(0, 6)
_records = st.builds(
    lambda number, references, narinfo, variant: path(
        number, *references, narinfo=narinfo, nar_hash=nar_hash(number + variant)
    ),
    _numbers,
    st.lists(_numbers, max_size=4),
    st.binary(max_size=2),
    st.sampled_from((0, 0, 0, 1)),
)


class CatalogMachine(RuleBasedStateMachine):
    """Publishing and removing, against a dictionary. A subclass gives the catalog, and `run` for its coroutines."""

    catalog: Catalog
    run: Callable[[Any], Any]

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, PathRecord] = {}

    @rule(records=st.lists(_records, max_size=5))
    def publish(self, records: list[PathRecord]) -> None:
        expected = dict(self.model)
        for record in records:
            stored = replace(record, references=tuple(sorted(set(record.references))))
            if expected.setdefault(record.hash_part, stored).nar_hash != record.nar_hash:
                with pytest.raises(Conflict):
                    self.run(self.catalog.publish(records))
                return
            expected[record.hash_part] = stored
        self.run(self.catalog.publish(records))
        self.model = expected

    @rule(numbers=st.sets(_numbers, max_size=4))
    def remove(self, numbers: set[int]) -> None:
        gone = {hash_part(number) for number in numbers}
        self.run(self.catalog.remove("main", gone))
        self.model = {key: record for key, record in self.model.items() if key not in gone}

    @invariant()
    def all_ways_tell_the_same(self) -> None:
        known = [self.model[key] for key in sorted(self.model)]
        assert self.run(scanned(self.catalog)) == known
        assert self.run(self.catalog.count("main")) == (len(known), sum(record.nar_size for record in known))
        there = {base_name(int(record.hash_part)) for record in known}
        missing = [(r.hash_part, reference) for r in known for reference in r.references if reference not in there]
        assert self.run(self.catalog.dangling("main", 100)) == missing
        for number in range(7):
            referrers = {r.hash_part for r in known if base_name(number) in r.references} - {hash_part(number)}
            assert self.run(self.catalog.referrers("main", hash_part(number))) == referrers
