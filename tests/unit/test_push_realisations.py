"""Realisations go with their paths: after them, each after those that it needs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NoReturn

import pytest

from cachesrv.errors import NotAllowed
from cachesrv.nix.realisation import OutputId, Realisation, object_name, parse_realisation
from cachesrv.nix.signing import Signature
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, hang, store_path

LIBRARY, TOOL, PROGRAM = (OutputId(f"sha256:{digit * 64}", "out") for digit in "210")
NAMES = {LIBRARY: "library", TOOL: "tool", PROGRAM: "program"}


@pytest.fixture
def store(store: TemporaryStore) -> TemporaryStore:
    """Three content-addressed paths, each of which needs those before it, also as realisations."""
    before: list[OutputId] = []
    for output, name in NAMES.items():
        info = store.add(name, name.encode(), [NAMES[other] for other in before])
        store.infos[info.store_path] = replace(info, ca="fixed:r:sha256:x")
        needed = tuple(sorted((other, store_path(NAMES[other])) for other in before))
        store.realised[output] = Realisation(info.store_path, (Signature("key", bytes(64)),), needed)
        before.append(output)
    return store


async def run(store: TemporaryStore, cache: FakeCache, *names: str, dry_run: bool = False) -> list[events.Event]:
    told: list[events.Event] = []
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names]
    await push(paths, store, settings, Options(dry_run=dry_run), told.append)
    return told


def realised(told: list[events.Event]) -> list[str]:
    return [event.output for event in told if isinstance(event, events.Realised)]


async def test_who_cannot_be_told_of_them_says_so(
    store: TemporaryStore, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(paths: object) -> NoReturn:
        raise NotAllowed("this user may not read the database")

    monkeypatch.setattr(store, "realisations", refuse)
    for path, info in store.infos.items():
        store.infos[path] = replace(info, deriver=store_path("name.drv"))
    store.add("source", b"source")
    told = await run(store, cache, "program", "source")
    again = await run(store, cache, "source")

    (noted,) = (event.text for event in told if isinstance(event, events.Noted))
    assert "and 2 others came out of is not pushed" in noted
    assert noted.endswith("this user may not read the database")
    assert not [event for event in again if isinstance(event, events.Noted)]
    assert len(cache.published) == 4


async def test_they_follow_their_paths_in_order(store: TemporaryStore, cache: FakeCache) -> None:
    told = await run(store, cache, "program")

    assert realised(told) == list(cache.realisations) == [object_name(one) for one in (LIBRARY, TOOL, PROGRAM)]
    assert cache.requests.index("realisation") > cache.requests.index("paths")
    for output in NAMES:
        assert parse_realisation(cache.realisations[object_name(output)], output) == store.realised[output]
    (plan,) = (event for event in told if isinstance(event, events.PlanMade))
    assert plan.realisations == 3


async def test_none_is_sent_when_the_push_has_ended(store: TemporaryStore, cache: FakeCache) -> None:
    """One of several that are on their way at once shows that the others cannot arrive either."""
    store.realised = {output: replace(one, dependencies=()) for output, one in store.realised.items()}
    cache.fail("realisation", hang, answer(403))

    with pytest.raises(NotAllowed):
        await run(store, cache, "program")

    assert [task for task in asyncio.all_tasks() if "RealisationUpload" in repr(task.get_coro())] == []


async def test_those_that_are_there_are_not_sent_again(store: TemporaryStore, cache: FakeCache) -> None:
    await run(store, cache, "program")
    del cache.realisations[object_name(PROGRAM)]
    cache.requests.clear()

    assert realised(await run(store, cache, "program")) == [object_name(PROGRAM)]
    assert cache.requests == ["cache", "missing", "missing", "realisation"]


async def test_a_dry_run_sends_none(store: TemporaryStore, cache: FakeCache) -> None:
    assert realised(await run(store, cache, "program", dry_run=True)) == []
    assert cache.realisations == {}


async def test_without_content_addressed_paths_nobody_is_asked(store: TemporaryStore, cache: FakeCache) -> None:
    store.infos = {path: replace(info, ca=None) for path, info in store.infos.items()}

    assert realised(await run(store, cache, "program")) == []
    assert cache.count("missing") == 1


async def test_one_that_is_refused_fails_those_that_need_it(store: TemporaryStore, cache: FakeCache) -> None:
    cache.fail("realisation", answer(422, "not signed"))

    told = await run(store, cache, "program")

    failed = {event.path: event.error for event in told if isinstance(event, events.Failed)}
    assert failed[object_name(LIBRARY)] == "not signed"
    assert failed[object_name(TOOL)] == f"it needs {object_name(LIBRARY)}, which is not in the cache"
    assert object_name(PROGRAM) in failed
    assert cache.realisations == {}
    assert len(cache.published) == 3


async def test_that_of_a_path_that_failed_is_not_sent(store: TemporaryStore, cache: FakeCache) -> None:
    store.file("tool").write_bytes(b"damaged")

    assert realised(await run(store, cache, "program")) == [object_name(LIBRARY)]
