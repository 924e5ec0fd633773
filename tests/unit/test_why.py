"""What keeps a path is what a collection goes by."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog.base import ConflictRecord, RefusalRecord
from cachesrv.services.marking import Marking
from cachesrv.services.why import Why
from tests.collecting import DAY, HOUR, START, Clock, Process, Stores, cache, policy
from tests.samples import Sample, path_of

if TYPE_CHECKING:
    from cachesrv.services.marking import Policy
    from cachesrv.services.why import Explanation

MAIN = cache()
CACHES = {"main": MAIN}
MONTH = policy(max_age=30 * DAY)
LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path,))
PROGRAM = Sample("program", b"program", (TOOL.path, LIBRARY.path))


async def why(stores: Stores, sample: Sample, policy: Policy | None = MONTH) -> Explanation:
    return await Why(stores.catalog, stores.storage.head, MAIN, policy, history=300 * DAY).explain(
        sample.path.hash_part
    )


def texts(explanation: Explanation, *kinds: str) -> list[str]:
    return [reason.text for reason in explanation.reasons if not kinds or reason.kind in kinds]


async def pin(stores: Stores, sample: Sample, name: str = "release", expires_at: int | None = None) -> None:
    await stores.catalog.pin("main", name, sample.path.base_name, keep=1, expires_at=expires_at, at=START, by="ann")


async def test_what_is_used_is_kept_for_a_while(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(2 * HOUR)
    explanation = await why(stores, LIBRARY)
    assert (explanation.state, explanation.kept) == ("published", True)
    assert texts(explanation) == [
        f"{LIBRARY.path.base_name} was published 2023-11-14 22:13Z by somebody; its NAR takes 120 bytes",
        "used last 2023-11-14 22:13Z; no other path refers to it",
        "used within retention_age = 30 d: kept until 2023-12-14 22:13Z",
    ]
    clock.pass_(30 * DAY)
    explanation = await why(stores, LIBRARY)
    assert not explanation.kept
    assert texts(explanation, "nothing", "policy") == ["nothing keeps it: the next collection takes it away"]


async def test_what_was_used_just_now_is_kept_by_the_time_of_a_lease(stores: Stores, process: Process) -> None:
    await process.push(MAIN, LIBRARY)
    explanation = await why(stores, LIBRARY, policy(max_age=0))
    assert texts(explanation, "policy") == ["used within [collect] lease = 1 h: kept until 2023-11-14 23:13Z"]


async def test_the_way_from_a_pin(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY, TOOL, PROGRAM)
    clock.pass_(31 * DAY)
    await pin(stores, PROGRAM)
    await pin(stores, TOOL, "preview", expires_at=START + 40 * DAY)
    await pin(stores, LIBRARY, "expired", expires_at=START + 30 * DAY)
    explanation = await why(stores, LIBRARY)
    assert explanation.kept
    assert texts(explanation, "pin") == [
        "kept by the pin preview until 2023-12-24 22:13Z: tool -> library",
        "kept by the pin release: program -> library",
    ]
    assert texts(explanation, "policy", "nothing") == []
    assert texts(await why(stores, PROGRAM), "pin") == ["kept by the pin release: program"]
    for number in range(6):
        await pin(stores, PROGRAM, f"x{number}")
    explanation = await why(stores, LIBRARY)
    assert len(texts(explanation, "pin")) == 6
    assert texts(explanation, "pin")[-1] == "and by 3 more pins"


async def test_long_ways_are_cut_short(stores: Stores, process: Process) -> None:
    chain = [Sample("path-0", b"0")]
    for number in range(1, 20):
        chain.append(Sample(f"path-{number}", b"%d" % number, (chain[-1].path,)))
    await process.push(MAIN, *chain)
    await pin(stores, chain[-1])
    assert texts(await why(stores, chain[0]), "pin") == [
        (
            "kept by the pin release: path-19 -> path-18 -> path-17 -> path-16 -> … 12 more …"
            " -> path-3 -> path-2 -> path-1 -> path-0"
        )
    ]


async def test_who_needs_it_keeps_it(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY, TOOL, PROGRAM)
    clock.pass_(20 * DAY)
    await stores.catalog.touch("main", {TOOL.path.hash_part: int(clock.now)})
    clock.pass_(20 * DAY)
    explanation = await why(stores, LIBRARY)
    assert texts(explanation)[1:] == [
        "used last 2023-11-14 22:13Z; needed by 2 paths, 2 of them directly",
        "the latest of these uses was 2023-12-04 22:13Z: tool -> library",
        "used within retention_age = 30 d: kept until 2024-01-03 22:13Z",
    ]
    assert not (await why(stores, PROGRAM)).kept
    await stores.catalog.touch("main", {LIBRARY.path.hash_part: int(clock.now)})
    assert texts(await why(stores, LIBRARY), "use") == [
        "used last 2023-12-24 22:13Z; needed by 2 paths, 2 of them directly, and were not used later"
    ]


async def test_a_push_keeps_what_it_relies_on(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY, TOOL)
    clock.pass_(31 * DAY)
    await process.grant(MAIN, TOOL)
    assert texts(await why(stores, LIBRARY), "lease") == ["kept by a push that relies on it: tool -> library"]
    clock.pass_(2 * HOUR)
    assert not (await why(stores, LIBRARY)).kept


async def test_room_is_room_for_all_that_was_used_later(stores: Stores, process: Process, clock: Clock) -> None:
    for sample in (LIBRARY, TOOL):
        await process.push(MAIN, sample)
        clock.pass_(DAY)
    explanation = await why(stores, LIBRARY, policy(max_size=1000))
    assert texts(explanation, "policy") == ["there is room for it within retention_size = 1000 bytes"]
    other = Sample("other", b"x" * 800)
    await process.push(MAIN, other)
    clock.pass_(DAY)
    assert not (await why(stores, LIBRARY, policy(max_size=1000))).kept
    assert (await why(stores, other, policy(max_size=1000))).kept


async def test_a_cache_that_keeps_everything(stores: Stores, process: Process) -> None:
    await process.push(MAIN, LIBRARY)
    explanation = await why(stores, LIBRARY, None)
    assert texts(explanation, "policy") == ["main keeps all paths: it has no retention_age and no retention_size"]


async def test_what_was_collected(stores: Stores, process: Process, clock: Clock) -> None:
    await process.push(MAIN, LIBRARY)
    clock.pass_(31 * DAY)
    await process.collect(CACHES, {"main": MONTH})
    explanation = await why(stores, LIBRARY)
    assert (explanation.state, explanation.kept) == ("removed", False)
    removal, nar = texts(explanation)
    assert removal.startswith(f"{LIBRARY.path.base_name} was removed 2023-12-15 22:13Z by test: not used for more than")
    assert nar == f"its NAR, {LIBRARY.nar_hash.nix32}, is still here: pushed again, it need not be sent"
    clock.pass_(31 * DAY)
    await process.collect(CACHES, {"main": MONTH})
    assert len(texts(await why(stores, LIBRARY))) == 1
    await process.push(MAIN, LIBRARY)
    assert (await why(stores, LIBRARY)).state == "published"


async def test_what_never_came(stores: Stores) -> None:
    explanation = await why(stores, LIBRARY)
    assert explanation.state == "unknown"
    assert texts(explanation) == [
        f"{LIBRARY.path.hash_part} was never pushed to main, as far as that is remembered: [collect] history = 300 d"
    ]


async def test_what_was_refused(stores: Stores) -> None:
    record = RefusalRecord("main", LIBRARY.path.hash_part, "library", "no signature by a trusted key", "ci", START)
    await stores.catalog.record_refusals([record])
    explanation = await why(stores, LIBRARY)
    assert (explanation.state, explanation.kept) == ("refused", False)
    assert texts(explanation) == [
        f"a push of {LIBRARY.path.base_name} by ci was refused 2023-11-14 22:13Z: no signature by a trusted key"
    ]


async def test_what_was_pushed_with_another_nar(stores: Stores, process: Process) -> None:
    await process.push(MAIN, LIBRARY)
    hashes = LIBRARY.nar_hash.nix32, TOOL.nar_hash.nix32
    await stores.catalog.record_conflicts(
        [ConflictRecord("main", LIBRARY.path.hash_part, "library", *hashes, pusher="ci", at=START)]
    )
    (text,) = texts(await why(stores, LIBRARY), "conflict")
    assert text.startswith(f"another NAR for it, {hashes[1]}, was refused 2023-11-14 22:13Z from ci; published, by")


@pytest.mark.parametrize("seed", range(6))
async def test_the_verdict_is_that_of_a_collection(stores: Stores, process: Process, clock: Clock, seed: int) -> None:
    chance = random.Random(seed)
    samples: list[Sample] = []
    for number in range(24):
        known = [sample.path for sample in samples]
        references = chance.sample(known, min(len(known), chance.choice([0, 1, 1, 2])))
        samples.append(Sample(f"path-{number}", b"%d" % chance.randrange(18), tuple(sorted(references))))
    await process.push(MAIN, *samples)
    clock.pass_(100 * DAY)
    for sample in chance.sample(samples, 12):
        at = int(clock.now) - chance.randrange(60 * DAY)
        await stores.catalog.touch("main", {sample.path.hash_part: at})
    for sample in chance.sample(samples, 2):
        await pin(stores, sample, sample.name, expires_at=int(clock.now) + chance.choice([-1, 1]) * DAY)
    await process.grant(MAIN, chance.choice(samples))
    numbers = await stores.catalog.numbers("main", [sample.path.hash_part for sample in samples])
    for by in (MONTH, policy(max_age=0), policy(max_size=1200), policy(max_age=30 * DAY, max_size=1800)):
        plan = await Marking(stores.catalog, "main").plan(by, int(clock.now))
        for sample in samples:
            explanation = await why(stores, sample, by)
            assert explanation.kept == (numbers[sample.path.hash_part] not in plan), (sample.name, explanation)


async def test_a_path_that_refers_to_itself(stores: Stores, process: Process) -> None:
    loop = Sample("loop", b"loop", (path_of("loop"),))
    await process.push(MAIN, loop)
    assert texts(await why(stores, loop), "use") == ["used last 2023-11-14 22:13Z; no other path refers to it"]
