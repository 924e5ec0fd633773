"""What the tables of the catalog hold after its methods, and by which index its statements find it."""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from cachesrv.catalog.base import RefusalRecord
from cachesrv.catalog.batches import batches
from cachesrv.catalog.retention import MAINTENANCE, Reliance
from cachesrv.catalog.sql import SqlCatalog
from tests.contracts.catalog_contract import NOW, base_name, hash_part, nar, nar_hash, path, refusal, scanned, token
from tests.contracts.retention_contract import HOLDER, removal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cachesrv.catalog.base import Catalog


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
async def catalog(file: Path) -> AsyncIterator[SqlCatalog]:
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    yield catalog
    await catalog.close()


def rows(file: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_names_that_nothing_needs_any_more_go(catalog: Catalog, file: Path) -> None:
    await catalog.publish([path(1, 1, 2, 3), path(2, 3), path(4, 1)])
    await catalog.remove("main", [hash_part(1)])
    assert rows(file, "SELECT name FROM names ORDER BY id") == [
        ("package-1",),
        ("package-2",),
        ("package-3",),
        ("package-4",),
    ]
    await catalog.publish([path(4)])
    assert rows(file, "SELECT name FROM names ORDER BY id") == [("package-2",), ("package-3",), ("package-4",)]
    await catalog.remove("main", [hash_part(2), hash_part(4)])
    for table in ("names", "paths", "narinfos", "refs"):
        assert rows(file, f"SELECT * FROM {table}") == []


async def test_one_hash_part_may_be_referred_to_by_several_names(catalog: Catalog) -> None:
    wrong = f"{hash_part(2)}-wrong"
    await catalog.publish([path(1, references=(wrong,)), path(2), path(3, 2)])
    assert await scanned(catalog) == [path(1, references=(wrong,)), path(2), path(3, 2)]
    assert await catalog.referrers("main", hash_part(2)) == {hash_part(1), hash_part(3)}


async def test_last_use_never_moves_back(catalog: Catalog, file: Path) -> None:
    await catalog.publish([path(1), path(2), path(1, cache="other")])
    for at in (NOW + 5, NOW, NOW + 5, NOW + 7, NOW + 6):
        await catalog.touch("main", {hash_part(1): at})
    assert rows(file, "SELECT cache, hash_part, last_used_at FROM paths ORDER BY 1, 2") == [
        ("main", hash_part(1), NOW + 7),
        ("main", hash_part(2), None),
        ("other", hash_part(1), None),
    ]


async def test_to_write_the_same_again_writes_nothing(catalog: Catalog, file: Path) -> None:
    async def write(at: int) -> None:
        await catalog.publish([path(n, 1, n + 1, registered_at=at) for n in range(10)])
        await catalog.put_nar(nar(1, listing=None))
        await catalog.put_token(token("ci", 1))
        await catalog.record_conflicts([refusal(1)])
        await catalog.touch("main", {hash_part(1): NOW})

    await write(NOW)
    log = file.with_name(f"{file.name}-wal")
    before = log.stat()
    await write(NOW + 1)
    await catalog.remove("main", [hash_part(99)])
    assert (log.stat().st_size, log.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


async def test_no_statement_reads_a_whole_table(catalog: SqlCatalog, file: Path) -> None:
    statements: dict[str, Any] = {}

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        statements[statement] = parameters[0] if isinstance(parameters, list) else parameters

    for engine in (catalog._database._reader, catalog._database._writer):
        event.listen(engine, "before_cursor_execute", note)
    await catalog.publish([path(1, 1, 2), path(2)])
    await catalog.publish([path(1, 3, nar_key="other")])
    await catalog.path("main", hash_part(1))
    await catalog.present("main", [hash_part(1)])
    await scanned(catalog)
    await catalog.referrers("main", hash_part(3))
    await catalog.touch("main", {hash_part(1): NOW})
    await catalog.remove("main", [hash_part(1)])
    await catalog.put_nar(nar(1))
    await catalog.nars_by_hash("main", [nar_hash(1)])
    await catalog.publish([path(1, nar_key=nar(1).key)])
    await catalog.remove_nars([nar(1).key])
    await catalog.record_conflicts([refusal(1)])
    await catalog.record_conflicts([refusal(1, at=NOW + 1)])
    await catalog.conflicts("main", hash_part(1))
    await catalog.record_refusals([RefusalRecord("main", hash_part(1), "package-1", "no signature", "ci", NOW)])
    await catalog.refusal("main", hash_part(1))
    await catalog.count("main")
    await catalog.put_token(token("ci", 1))
    await catalog.token(token("ci", 1).sha256)
    await catalog.revoke_token("ci", NOW)
    await catalog.publish([path(1, 3), path(3)])
    await use_retention(catalog)

    connection = sqlite3.connect(file)
    for statement, parameters in statements.items():
        if not statement.startswith("BEGIN"):
            plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            assert not [step for *_, step in plan if re.match(r"SCAN (?!.*CONSTANT ROW)", step)], (statement, plan)
    connection.close()
    assert len(statements) > 25


async def use_retention(catalog: SqlCatalog) -> None:
    for _ in range(2):
        await catalog.pin("main", "release", base_name(1), keep=1, expires_at=None, at=NOW, by="ann")
    await catalog.pinned("main", NOW)
    await catalog.unpin("main", "release")
    await catalog.lease("main", [hash_part(1)], NOW)
    await catalog.touch_nars([path(1).nar_key], NOW)
    await catalog.put_nar(nar(1))
    await catalog.lease_nars("main", [nar_hash(1)], NOW)
    await catalog.uses("main", NOW)
    numbers = (await catalog.numbers("main", [hash_part(1), hash_part(3)])).values()
    await catalog.referred(numbers)
    await catalog.summaries("main", numbers)
    await catalog.lock(MAINTENANCE, HOLDER, now=NOW, until=NOW + 1)
    await catalog.publish([path(1, 3)], Reliance({"main": [hash_part(3)]}, ["main/other"]))
    removed = await catalog.remove_unneeded(removal(siblings=["other"], used_before=NOW + 9), numbers)
    assert len(removed.gone) == 2
    await catalog.unused_nars("main", NOW + 1, NOW)
    await catalog.release_strays(["main/nar/stray"], NOW)
    await catalog.doom_damaged(["main/nar/stray"], holder=HOLDER)
    await catalog.doom_unpublished(["main"], {hash_part(1): ["main/x.narinfo"]}, holder=HOLDER)
    await catalog.doom([nar(1).key], holder=HOLDER, before=NOW + 1, now=NOW)
    await catalog.settle([nar(1).key])
    await catalog.removal("main", hash_part(1))
    await catalog.removals("main", NOW)
    await catalog.forget_removals(NOW)
    await catalog.unlock(MAINTENANCE, HOLDER)


async def test_counting_reads_one_index_only(catalog: SqlCatalog, file: Path) -> None:
    ((*_, plan),) = rows(file, "EXPLAIN QUERY PLAN SELECT count(*), sum(nar_size) FROM paths WHERE cache = 'main'")
    assert "COVERING INDEX" in str(plan)


@pytest.mark.parametrize("number", [0, 1, 1_999, 2_000, 2_001, 70_000])
def test_batches_hold_each_value_once_and_fit_into_a_statement(number: int) -> None:
    cut = list(batches([*range(number), *range(number)]))
    assert [value for some in cut for value in some] == list(range(number))
    assert all(0 < len(some) < 32_000 for some in cut)
