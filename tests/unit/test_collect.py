"""Collecting: what goes, in what order, why, and what stays."""

from __future__ import annotations

import pytest

from cachesrv.catalog.retention import MAINTENANCE, RemovalRecord
from cachesrv.errors import LockLost, StoreError
from cachesrv.index.base import Present
from cachesrv.services import sweeping
from tests.collecting import (
    DAY,
    GRACE,
    HOLDER,
    LEASE,
    START,
    Clock,
    Gate,
    Process,
    Stores,
    cache,
    check_consistency,
    die,
    names_in,
    nars_in,
    open_stores,
    policy,
)
from tests.contracts.catalog_contract import base_name, path
from tests.samples import Sample

MAIN = cache()
CACHES = {"main": MAIN}
LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path,))
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path))
OTHER = Sample("other", b"other")
MONTH = {"main": policy(max_age=30 * DAY)}


async def use(stores: Stores, sample: Sample, at: float) -> None:
    await stores.catalog.touch("main", {sample.path.hash_part: int(at)})


async def pin(stores: Stores, sample: Sample, expires_at: int | None = None) -> None:
    await stores.catalog.pin("main", "p", sample.path.base_name, keep=1, expires_at=expires_at, at=START, by="ann")


async def test_what_was_not_used_for_too_long_goes_with_its_objects(
    stores: Stores, process: Process, clock: Clock
) -> None:
    await process.push(MAIN, LIBRARY, TOOL, OTHER)
    clock.pass_(20 * DAY)
    await use(stores, OTHER, clock.now)
    clock.pass_(10 * DAY)
    assert (await process.collect(CACHES, MONTH))[0].paths == 0
    clock.pass_(1)
    report, heard = await process.collect(CACHES, MONTH)
    assert (report.paths, report.nars, report.path_bytes) == (2, 0, len(LIBRARY.file) + len(TOOL.file))
    assert heard.names == ["tool", "library"]
    assert heard.paths[0][2] == "not used for more than retention_age = 30 d, last used 2023-11-14 22:13Z"
    assert await names_in(stores, MAIN) == {"other"}
    in_storage = {info.key async for info in stores.storage.list("main/")}
    kept = {f"main/{OTHER.path.hash_part}{suffix}" for suffix in (".narinfo", ".ls")}
    nars = {f"main/nar/{sample.nar_name}" for sample in (LIBRARY, TOOL, OTHER)}
    assert in_storage == kept | nars | {"main/nix-cache-info"}
    assert await stores.catalog.removal("main", TOOL.path.hash_part) == RemovalRecord(
        "main",
        TOOL.path.hash_part,
        "tool",
        TOOL.nar_hash.nix32,
        "not used for more than retention_age = 30 d, last used 2023-11-14 22:13Z",
        by="test",
        at=int(clock.now),
    )
    await check_consistency(stores, CACHES)


async def test_what_is_needed_by_what_is_used_stays(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY, TOOL, PROGRAM)
    clock.pass_(100 * DAY)
    await use(stores, TOOL, clock.now - DAY)
    _, heard = await process.collect(CACHES, MONTH)
    assert heard.names == ["program"]
    await check_consistency(stores, CACHES)


async def test_pins_and_leases_keep_closures(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY, TOOL, PROGRAM, OTHER)
    clock.pass_(100 * DAY)
    await pin(stores, TOOL, expires_at=int(clock.now) + 60)
    await process.grant(MAIN, OTHER)
    assert (await process.collect(CACHES, MONTH))[1].names == ["program"]
    clock.pass_(60)
    assert (await process.collect(CACHES, MONTH))[1].names == ["tool", "library"]
    clock.pass_(2 * LEASE)
    assert (await process.collect(CACHES, MONTH))[1].names == ["other"]


async def test_a_cache_without_a_policy_keeps_everything(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(10_000 * DAY)
    assert (await process.collect(CACHES, {}))[0].paths == 0


async def test_the_closures_that_were_used_last_fit_into_the_size(
    stores: Stores, process: Process, clock: Clock
) -> None:
    await process.push(MAIN, LIBRARY, TOOL, PROGRAM, OTHER)
    for sample in (OTHER, TOOL, PROGRAM):
        clock.pass_(DAY)
        await use(stores, sample, clock.now)
    clock.pass_(DAY)
    total = sum(len(sample.file) for sample in (LIBRARY, TOOL, PROGRAM, OTHER))
    assert (await process.collect(CACHES, {"main": policy(max_size=total)}))[0].paths == 0
    _, heard = await process.collect(CACHES, {"main": policy(max_size=total - 1)})
    assert heard.paths == [
        ("main", "other", f"no room within retention_size = {total - 1} bytes, last used 2023-11-15 22:13Z")
    ]
    await use(stores, TOOL, clock.now)
    clock.pass_(DAY)
    small = len(TOOL.file) + len(LIBRARY.file)
    assert (await process.collect(CACHES, {"main": policy(max_size=small)}))[1].names == ["program"]
    report, heard = await process.collect(CACHES, {"main": policy(max_size=small - 1)})
    assert heard.names == ["tool", "library"]
    assert report.path_bytes == small


async def test_age_goes_before_size(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(20 * DAY)
    await process.push(MAIN, OTHER)
    clock.pass_(20 * DAY)
    _, heard = await process.collect(CACHES, {"main": policy(max_age=30 * DAY, max_size=10**9)})
    assert [reason.partition(",")[0] for *_, reason in heard.paths] == ["not used for more than retention_age = 30 d"]


async def test_what_was_used_just_now_stays_however_small_the_cache_is(
    stores: Stores, process: Process, clock: Clock
) -> None:
    await process.push(MAIN, LIBRARY, TOOL)
    clock.pass_(LEASE - 1)
    nothing = {"main": policy(max_age=0, max_size=0)}
    assert (await process.collect(CACHES, nothing))[0].paths == 0
    clock.pass_(1)
    assert (await process.collect(CACHES, nothing))[0].paths == 2


async def test_an_equal_nar_counts_once_and_stays_for_its_last_path(
    stores: Stores, process: Process, clock: Clock
) -> None:
    twins = [Sample(name, b"the same") for name in ("one", "two", "three")]
    await process.push(MAIN, *twins)
    clock.pass_(DAY)
    size = len(twins[0].file)
    assert (await process.collect(CACHES, {"main": policy(max_size=size)}))[0].paths == 0
    await use(stores, twins[1], clock.now)
    clock.pass_(30 * DAY)
    report, heard = await process.collect(CACHES, MONTH, nar_grace=0)
    assert (sorted(heard.names), report.path_bytes, report.nars) == (["one", "three"], 0, 0)
    clock.pass_(1)
    report, heard = await process.collect(CACHES, MONTH, nar_grace=0)
    assert (report.paths, report.path_bytes) == (1, size)
    assert (report.nars, report.nar_bytes, heard.nars) == (1, size, [f"main/nar/{twins[0].nar_name}"])
    assert await nars_in(stores) == set()


async def test_nars_stay_for_the_grace_period(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    await process.send(MAIN, OTHER)
    clock.pass_(31 * DAY)
    report, heard = await process.collect(CACHES, MONTH)
    assert (report.paths, heard.nars) == (1, [f"main/nar/{OTHER.nar_name}"])
    clock.pass_(GRACE)
    assert (await process.collect(CACHES, MONTH))[0].nars == 0
    clock.pass_(1)
    assert (await process.collect(CACHES, MONTH))[1].nars == [f"main/nar/{LIBRARY.nar_name}"]
    assert await nars_in(stores) == set()
    assert await stores.catalog.nar(f"main/nar/{LIBRARY.nar_name}") is None


async def test_the_grace_period_begins_when_a_path_goes_however_long_a_collection_takes(
    stores: Stores, process: Process, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "TOGETHER", 1)
    await process.push(MAIN, LIBRARY, TOOL)
    clock.pass_(31 * DAY)

    async def take_long() -> None:
        clock.pass_(GRACE + DAY)

    gate = Gate(4, take_long, late=True)
    slow = Process(stores.through(gate))
    report, heard = await slow.collect(CACHES, MONTH)
    assert gate.writes[4:6] == ["settle", "hold"]
    assert (report.paths, heard.nars) == (2, [f"main/nar/{TOOL.nar_name}"])
    await slow.end()


async def test_a_path_that_comes_back_keeps_its_nar(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(31 * DAY)
    await process.collect(CACHES, MONTH)
    clock.pass_(DAY)
    await process.publish(MAIN, LIBRARY)
    clock.pass_(GRACE + DAY)
    assert (await process.collect(CACHES, MONTH))[0].nars == 0
    await check_consistency(stores, CACHES)


async def test_a_nar_on_its_way_to_its_path_stays_without_any_grace(
    stores: Stores, process: Process, clock: Clock
) -> None:
    await process.send(MAIN, LIBRARY)
    clock.pass_(LEASE - 1)
    assert (await process.collect(CACHES, MONTH, nar_grace=0))[0].nars == 0
    await process.send(MAIN, LIBRARY)
    clock.pass_(LEASE - 1)
    assert (await process.collect(CACHES, MONTH, nar_grace=0))[0].nars == 0
    await process.grant(MAIN, LIBRARY)
    clock.pass_(LEASE - 1)
    assert (await process.collect(CACHES, MONTH, nar_grace=0))[0].nars == 0
    await process.publish(MAIN, LIBRARY)


async def test_caches_with_the_same_objects_keep_them_for_each_other(clock: Clock) -> None:
    one, two = cache("one", "shared"), cache("two", "shared")
    caches = {"one": one, "two": two}
    policies = {"one": policy(max_age=DAY)}
    async with open_stores() as stores:
        process = Process(stores)
        await process.push(one, LIBRARY)
        await process.push(two, LIBRARY)
        clock.pass_(2 * DAY)
        assert (await process.collect(caches, policies, nar_grace=0))[0].paths == 1
        clock.pass_(DAY)
        assert (await process.collect(caches, policies, nar_grace=0))[0].nars == 0
        assert (await names_in(stores, one), await names_in(stores, two)) == (set(), {"library"})
        await check_consistency(stores, caches)
        await process.end()


async def test_what_others_write_to_is_left_alone(clock: Clock) -> None:
    bucket = cache(bucket_is_authority=True)
    async with open_stores() as stores:
        process = Process(stores)
        await process.push(bucket, LIBRARY)
        await process.send(bucket, OTHER)
        clock.pass_(1000 * DAY)
        report, _ = await process.collect({"main": bucket}, MONTH)
        assert (report.paths, report.nars) == (0, 0)
        await process.end()


async def test_what_others_write_to_under_another_name_is_left_alone_too(
    stores: Stores, process: Process, clock: Clock
) -> None:
    caches = {"main": MAIN, "team": cache("team", prefix="main", bucket_is_authority=True)}
    await process.push(MAIN, LIBRARY)
    clock.pass_(31 * DAY + GRACE)
    assert (await process.collect(caches, MONTH))[0].paths == 0
    assert await stores.storage.head(MAIN.narinfo_key(LIBRARY.path.hash_part))
    assert (await process.collect(CACHES, MONTH))[0].paths == 1


async def test_a_rehearsal_tells_the_same_and_changes_nothing(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY, TOOL, PROGRAM)
    await process.send(MAIN, OTHER)
    clock.pass_(40 * DAY)
    rehearsed, told = await process.collect(CACHES, MONTH, dry_run=True)
    assert await names_in(stores, MAIN) == {"library", "tool", "program"}
    assert await stores.catalog.removal("main", TOOL.path.hash_part) is None
    report, heard = await process.collect(CACHES, MONTH)
    assert rehearsed == report
    assert told == heard


async def test_what_went_long_ago_is_forgotten(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(31 * DAY)
    await process.collect(CACHES, MONTH)
    clock.pass_(400 * DAY)
    await process.collect(CACHES, MONTH)
    assert await stores.catalog.removal("main", LIBRARY.path.hash_part) is not None
    clock.pass_(1)
    await process.collect(CACHES, MONTH)
    assert await stores.catalog.removal("main", LIBRARY.path.hash_part) is None


async def test_large_graphs_go_in_many_steps_whatever_their_order(
    stores: Stores, process: Process, clock: Clock
) -> None:
    """Numbers of these paths say nothing of who refers to whom: as after a reindex."""
    records = [path(n, registered_at=START, references=(base_name((n + 7) % 1009), base_name(n))) for n in range(1009)]
    await stores.catalog.publish([record for record in records if int(record.hash_part) != 500])
    clock.pass_(31 * DAY)
    report, heard = await process.collect(CACHES, MONTH)
    assert report.paths == len(heard.paths) == 1008
    place = {name: number for number, name in enumerate(heard.names)}
    out_of_order = [
        n
        for n in range(1009)
        if n not in (493, 500) and place[f"package-{(n + 7) % 1009}"] < place[f"package-{n}"] - 250
    ]
    assert out_of_order == []


async def test_who_loses_the_lock_stops(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(31 * DAY)

    async def take_over() -> None:
        await stores.catalog.lock(MAINTENANCE, "another", now=0, until=1, in_place_of=HOLDER)

    slow = Process(stores.through(Gate(1, take_over)))
    with pytest.raises(LockLost):
        await slow.collect(CACHES, MONTH)
    assert await names_in(stores, MAIN) == {"library"}
    await slow.end()


async def test_a_path_removed_while_it_is_looked_up_does_not_come_back(
    stores: Stores, process: Process, clock: Clock
) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(31 * DAY)
    stores.index.clear("main")
    epoch = stores.index.epoch()
    text = (await stores.catalog.path("main", LIBRARY.path.hash_part)).narinfo  # type: ignore[union-attr]  # it is there
    assert isinstance(await process.find(MAIN, LIBRARY), Present)
    await process.collect(CACHES, MONTH)
    assert text
    assert stores.index.epoch() > epoch
    assert await process.find(MAIN, LIBRARY) is None
    await check_consistency(stores, CACHES)


async def test_a_collection_that_died_is_finished_by_the_next(stores: Stores, clock: Clock) -> None:
    """At each write once, before it and after it."""
    for late in (False, True):
        for at in range(100):
            process = Process(stores)
            await process.push(MAIN, LIBRARY, TOOL, PROGRAM)
            clock.pass_(31 * DAY + GRACE)
            gate = Gate(at, die, late=late)
            dying = Process(stores.through(gate))
            done = False
            try:
                await dying.collect(CACHES, MONTH, nar_grace=0)
                clock.pass_(1)
                await dying.collect(CACHES, MONTH, nar_grace=0)
                done = True
            except StoreError:
                pass
            await check_consistency(stores, CACHES)
            clock.pass_(1)
            for _ in range(2):
                await process.collect(CACHES, MONTH, nar_grace=0)
                clock.pass_(1)
            assert [info.key async for info in stores.storage.list("main/")] == ["main/nix-cache-info"]
            assert await stores.catalog.doomed() == []
            assert stores.index.count()[0] == 0
            await dying.end()
            await process.end()
            if done:
                assert at == 8
                break
