"""When paths were last used."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.services import usage
from cachesrv.services.usage import Usage
from tests.samples import Sample
from tests.service_site import open_site

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import pytest

SAMPLES = [Sample(f"sample-{number}", str(number).encode()) for number in range(3)]


class Touched:
    """A catalog that remembers what it was told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[tuple[str, Mapping[str, int]]] = []
        self.error = error

    async def touch(self, cache: str, last_used: Mapping[str, int]) -> None:
        self.told.append((cache, last_used))
        if self.error:
            raise self.error

    async def touch_nars(self, keys: Collection[str], at: int) -> None:
        self.told.append(("NARs", dict.fromkeys(keys, at)))


async def test_what_was_used_is_noted(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.send(*SAMPLES)
        await site.add(*SAMPLES)
        before = int(time.time())
        noting = Usage(site.catalog)
        for sample in SAMPLES[:2]:
            noting.add(f"main/{sample.path.hash_part}".encode())
        noting.add(f"main/{'0' * 32}".encode())
        noting.add(f"gone/{'0' * 32}".encode())
        await noting.flush()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as catalog:
        used = dict(catalog.execute("select hash_part, last_used_at from paths"))
    assert before <= used[SAMPLES[0].path.hash_part] <= time.time()
    assert used[SAMPLES[1].path.hash_part] is not None
    assert used[SAMPLES[2].path.hash_part] is None


async def test_each_path_is_told_once_and_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_BATCH", 10)
    catalog = Touched()
    noting = Usage(catalog)  # type: ignore[arg-type]  # the methods that it needs
    for number in [*range(25)] * 3:
        noting.add(f"main/{number:032}".encode())
    await noting.flush()
    assert [(cache, len(paths)) for cache, paths in catalog.told] == [("main", 10), ("main", 10), ("main", 5)]
    assert len({path for _, paths in catalog.told for path in paths}) == 25
    await noting.flush()
    assert len(catalog.told) == 3, "what was told is not told again"


async def test_a_clock_that_is_set_back_does_not_end_the_noting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 2_000_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    catalog = Touched()
    noting = Usage(catalog)  # type: ignore[arg-type]  # the methods that it needs
    key = f"main/{0:032}".encode()
    noting.add(key)
    await noting.flush()
    now -= 365 * 86_400
    for _ in range(3):
        noting.add(key)
        await noting.flush()
        now += 86_400
    assert len(catalog.told) == 4


async def test_what_is_gathered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_GATHERED", 10)
    catalog = Touched()
    noting = Usage(catalog)  # type: ignore[arg-type]  # the methods that it needs
    for number in range(100):
        noting.add(f"main/{number:032}".encode())
    await noting.flush()
    assert sum(len(paths) for _, paths in catalog.told) == 10


async def test_a_catalog_that_fails_is_no_reason_to_stop() -> None:
    catalog = Touched(StoreError("broken"))
    noting = Usage(catalog)  # type: ignore[arg-type]  # the methods that it needs
    noting.add(f"main/{'0' * 32}".encode())
    await noting.flush()
    assert len(catalog.told) == 1


async def test_who_comes_for_a_nar_uses_its_paths(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.send(*SAMPLES)
        await site.add(*SAMPLES)
        before = int(time.time())
        noting = Usage(site.catalog)
        noting.add_nar(f"main/nar/{SAMPLES[0].nar_name}")
        noting.add_nar("main/nar/none")
        await noting.flush()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as catalog:
        used = dict(catalog.execute("select hash_part, last_used_at from paths"))
    assert before <= used[SAMPLES[0].path.hash_part] <= time.time()
    assert used[SAMPLES[1].path.hash_part] is None


async def test_what_was_noted_is_not_noted_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_NOTED", 4)
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    catalog = Touched()
    noting = Usage(catalog, resolution=60)  # type: ignore[arg-type]  # the methods that it needs

    async def use(*paths: int) -> list[str]:
        """The paths and the NAR that were told of to the catalog."""
        catalog.told.clear()
        for number in paths:
            noting.add(f"main/{number:032}".encode())
        noting.add_nar("main/nar/x")
        await noting.flush()
        return [cache for cache, paths in catalog.told for _ in paths]

    assert await use(1, 2) == ["main", "main", "NARs"]
    now += 60
    assert await use(1, 2) == []
    assert await use(1, 3) == ["main"]
    now += 1
    assert await use(1) == ["main", "NARs"]
    assert await use(4, 5, 6) == ["main"] * 3
    assert await use(1) == ["main", "NARs"], "what is remembered is bounded"


async def test_what_the_catalog_did_not_take_is_told_again() -> None:
    catalog = Touched(StoreError("broken"))
    noting = Usage(catalog)  # type: ignore[arg-type]  # the methods that it needs
    for _ in range(2):
        noting.add(f"main/{'0' * 32}".encode())
        await noting.flush()
    assert len(catalog.told) == 2
