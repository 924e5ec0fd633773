"""Faults planted in the stores of a cache, and verification over them."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cachesrv.catalog.retention import MAINTENANCE
from cachesrv.index.base import IndexEntry
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey
from cachesrv.services.answer import present
from cachesrv.services.caches import ServedCache
from cachesrv.services.nar_check import NarCheck
from cachesrv.services.pace import Pace
from cachesrv.services.path_check import Stores
from cachesrv.services.repair import Means, Outcome, Repair
from cachesrv.services.spool import Spool
from cachesrv.services.verify import Allowances, Verify
from cachesrv.services.verify_journal import Counts, Journal
from tests.samples import Sample, path_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.copies import Copies
    from cachesrv.services.flaws import Flaw
    from tests.service_site import Site

LIBRARY = Sample("library", b"library" * 1000)
TOOL = Sample("tool", b"tool" * 100_000, (LIBRARY.path, path_of("tool")), compression="zstd")
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path))
OTHER = Sample("other", b"other")
CHAIN = (LIBRARY, TOOL, PROGRAM, OTHER)

HOLDER = "the repair of a test"
AT_ONCE = Allowances(patience=0, young=-60, abandoned=-60)

Resolve = Callable[[ServedCache, Collection[str]], Awaitable[set[str]]]
Found = set[tuple[str, str]]
"""Kinds of flaws, each with the name of the path or the object that has it."""


@dataclass
class Heard:
    """All that a verification told."""

    flaws: list[Flaw] = field(default_factory=list)
    stages: list[tuple[str, str, int | None]] = field(default_factory=list)
    told: list[Counts] = field(default_factory=list)

    def stage(self, cache: str, stage: str, total: int | None) -> None:
        self.stages.append((cache, stage, total))

    def flaw(self, flaw: Flaw) -> None:
        self.flaws.append(flaw)

    def progress(self, counts: Counts) -> None:
        self.told.append(counts)

    @property
    def found(self) -> Found:
        return {(flaw.kind, flaw.path[33:] or flaw.path or flaw.object) for flaw in self.flaws}


async def resolve_none(_cache: ServedCache, _hash_parts: Collection[str]) -> set[str]:
    return set()


@contextmanager
def verification(
    site: Site,
    *,
    caches: Mapping[str, ServedCache] | None = None,
    contents: bool = False,
    allowances: Allowances = AT_ONCE,
    resolve: Resolve | None = None,
) -> Iterator[Verify]:
    """Over all stores of the site, with the keys of its cache."""
    caches = caches or {site.cache.name: site.cache}

    stores = Stores(site.storage, site.catalog, site.index, resolve or resolve_none)
    keys = {name: keys_of(cache) for name, cache in caches.items()}
    check = NarCheck(site.storage, Pace(0), jobs=2) if contents else None
    try:
        yield Verify(stores, caches, keys, contents=check, allowances=allowances)
    finally:
        if check:
            check.close()


def keys_of(cache: ServedCache) -> dict[str, PublicKey]:
    return {**{key.name: key.public for key in cache.signing_keys}, **cache.trusted_keys}


async def verify(site: Site, journal: Path, **given: Any) -> Heard:
    """A whole run over all caches."""
    heard = Heard()
    caches = given.get("caches") or {site.cache.name: site.cache}
    with verification(site, **given) as run:
        notes = Journal(journal, {"contents": str(given.get("contents"))})
        try:
            counts = await run.run([*caches], notes, heard)
            notes.finish()
        finally:
            notes.close()
    assert sum(counts.flaws.values()) == len(heard.flaws)
    return heard


@dataclass
class Repaired:
    """What came of a repair, by the name of the path or the object."""

    outcomes: list[Outcome] = field(default_factory=list)

    def outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def results(self) -> dict[str, str]:
        return {_name(outcome.path): outcome.result for outcome in self.outcomes}


def _name(path: str) -> str:
    """Of a path, by its base name; hash parts and keys of objects are names themselves."""
    return path if "/" in path else path[33:] or path


async def repair(
    site: Site,
    flaws: list[Flaw],
    *places: Copies,
    caches: Mapping[str, ServedCache] | None = None,
    forced: bool = False,
    resolve: Resolve | None = None,
) -> Repaired:
    """Of all that was found, with these other copies."""
    caches = caches or {site.cache.name: site.cache}
    stores = Stores(site.storage, site.catalog, site.index, resolve or resolve_none)
    await site.catalog.lock(MAINTENANCE, HOLDER, now=0, until=2**40)
    repaired = Repaired()
    check = NarCheck(site.storage, Pace(0), jobs=2)
    with ThreadPoolExecutor(2) as threads:
        means = Means(
            ingest=site.ingest,
            publish=site.publish,
            spool=Spool(site.folder, threads),
            places=places,
            keys={name: keys_of(cache) for name, cache in caches.items()},
            contents=check,
            removed=site.folder / "removed",
            abandoned=AT_ONCE.abandoned,
            forced=forced,
        )
        try:
            counts = await Repair(stores, caches, means, holder=HOLDER).run(lambda: iter(flaws), repaired)
        finally:
            check.close()
            await site.catalog.unlock(MAINTENANCE, HOLDER)
    assert sum(counts.values()) == len(repaired.outcomes)
    return repaired


@dataclass(frozen=True)
class Fault:
    """What is done to a cache that holds CHAIN, and what is found then; if `contents`, only when NARs are read."""

    name: str
    plant: Callable[[Site], Awaitable[None]]
    found: Found
    contents: bool = False

    def __str__(self) -> str:
        return self.name


def nar_key(sample: Sample) -> str:
    return f"main/nar/{sample.nar_name}"


def narinfo_key(sample: Sample) -> str:
    return f"main/{sample.path.hash_part}.narinfo"


async def flip_a_bit(site: Site) -> None:
    damaged = bytearray(TOOL.file)
    damaged[len(damaged) // 2] ^= 4
    await site.storage.put(nar_key(TOOL), bytes(damaged), replace=True)


async def flip_a_bit_unpacked(site: Site) -> None:
    damaged = bytearray(OTHER.file)
    damaged[damaged.index(b"other")] ^= 4
    await site.storage.put(nar_key(OTHER), bytes(damaged), replace=True)


async def truncate(site: Site) -> None:
    await site.storage.put(nar_key(LIBRARY), LIBRARY.file[:-8], replace=True)


async def remove_nar(site: Site) -> None:
    await site.storage.delete([nar_key(LIBRARY)])


async def put_foreign_narinfo(site: Site) -> None:
    other = await site.storage.get(narinfo_key(OTHER), limit=10_000)
    assert other
    await site.storage.put(narinfo_key(TOOL), other, replace=True)


async def put_narinfo_of_another_store(site: Site) -> None:
    await site.storage.put(narinfo_key(TOOL), TOOL.narinfo(store_dir="/gnu/store"), replace=True)


async def put_garbage(site: Site) -> None:
    await site.storage.put(narinfo_key(TOOL), b"garbage\n", replace=True)


async def forge_signature(site: Site) -> None:
    text = await site.storage.get(narinfo_key(TOOL), limit=10_000)
    assert text
    info = narinfo.parse(text)
    forged = SecretKey.generate("main-1").sign(info.fingerprint)
    await site.storage.put(narinfo_key(TOOL), narinfo.render(info.replace_signatures([forged])), replace=True)


async def remove_narinfo(site: Site) -> None:
    await site.storage.delete([narinfo_key(OTHER)])


async def change_narinfo(site: Site) -> None:
    text = await site.storage.get(narinfo_key(OTHER), limit=10_000)
    assert text
    changed = replace(narinfo.parse(text), deriver=path_of("other.drv"))
    await site.storage.put(narinfo_key(OTHER), narinfo.render(changed), replace=True)


async def put_orphan_nar(site: Site) -> None:
    await site.storage.put("main/nar/orphan.nar", b"whatever")


async def leave_temporary_file(site: Site) -> None:
    file = site.folder / "objects" / "main" / "nar" / ".incoming-0123"
    file.write_bytes(b"half")
    os.utime(file, (time.time() - 100_000, time.time() - 100_000))


async def index_what_is_not_there(site: Site) -> None:
    ghost = Sample("ghost")
    site.index.put([IndexEntry("main", ghost.path.hash_part, present(ghost.narinfo()))])


async def index_an_older_answer(site: Site) -> None:
    site.index.put([IndexEntry("main", OTHER.path.hash_part, present(OTHER.narinfo()))])


async def index_as_absent(site: Site) -> None:
    site.index.delete([("main", OTHER.path.hash_part)])
    site.index.put_absent([("main", OTHER.path.hash_part)], int(time.time()) + 1000)


async def lose_a_path(site: Site) -> None:
    await site.catalog.remove("main", [LIBRARY.path.hash_part])


async def lose_the_catalog(site: Site) -> None:
    await site.catalog.remove("main", [sample.path.hash_part for sample in CHAIN])
    await site.catalog.remove_nars([nar_key(sample) for sample in CHAIN])


FAULTS = (
    Fault("bit flip in a compressed NAR", flip_a_bit, {("damaged-nar", "tool")}, contents=True),
    Fault("bit flip in a NAR", flip_a_bit_unpacked, {("damaged-nar", "other")}, contents=True),
    Fault("truncated NAR", truncate, {("wrong-size", "library")}),
    Fault("missing NAR", remove_nar, {("missing-nar", "library")}),
    Fault("foreign narinfo", put_foreign_narinfo, {("foreign-narinfo", "tool")}),
    Fault("narinfo of another store", put_narinfo_of_another_store, {("foreign-narinfo", "tool")}),
    Fault("no narinfo", put_garbage, {("unreadable-narinfo", "tool")}),
    Fault("wrong signature", forge_signature, {("wrong-signature", "tool")}),
    Fault("missing narinfo", remove_narinfo, {("missing-narinfo", "other")}),
    Fault("changed narinfo", change_narinfo, {("disagreement", "other")}),
    Fault("orphan NAR", put_orphan_nar, {("orphan-nar", "main/nar/orphan.nar")}),
    Fault("orphan temporary file", leave_temporary_file, {("stale-temporary-file", "main/nar/.incoming-0123")}),
    Fault("dangling index entry", index_what_is_not_there, {("dangling-index-entry", path_of("ghost").hash_part)}),
    Fault("older index entry", index_an_older_answer, {("wrong-index-entry", "other")}),
    Fault("path hidden by the index", index_as_absent, {("wrong-index-entry", "other")}),
    Fault(
        "path lost by the catalog",
        lose_a_path,
        {
            ("unpublished-path", "library"),
            ("missing-reference", "tool"),
            ("missing-reference", "program"),
            ("dangling-index-entry", LIBRARY.path.hash_part),
        },
    ),
    Fault(
        "deleted catalog",
        lose_the_catalog,
        {("unpublished-path", sample.name) for sample in CHAIN}
        | {("dangling-index-entry", sample.path.hash_part) for sample in CHAIN},
    ),
)

LOST = {
    "bit flip in a compressed NAR": {"tool", "program"},
    "bit flip in a NAR": {"other"},
    "truncated NAR": {"library", "tool", "program"},
    "missing NAR": {"library", "tool", "program"},
}
"""What cannot be had again without another copy."""
