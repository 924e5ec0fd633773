"""Pushes, uses, pins, leases, collections, crashes, and one in the middle of the other, against a simple model.

After every step each visible path has its NAR and its closure. After a collection that ran to its end, the cache holds
what the model says.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cachesrv.errors import BeingRemoved, CachesrvError, MissingNar, MissingReferences, NotFound, StoreError
from cachesrv.storage.decorators import Direct, Limited, Retrying
from cachesrv.storage.memory import MemoryStore
from cachesrv.storage.s3 import S3Store
from tests.collecting import (
    HOUR,
    LEASE,
    Clock,
    Gate,
    Process,
    Stores,
    cache,
    check_consistency,
    closure,
    die,
    names_in,
    nars_in,
    open_stores,
    policy,
)
from tests.samples import Sample, path_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.storage.base import ObjectStore
    from tests.radosgw import Gateway

MAIN = cache()
CACHES = {"main": MAIN}
NODES = 8
CONTENTS = 5
"""Less than there are nodes: some have equal NARs."""
GRACE = 3 * HOUR

nodes = st.integers(0, NODES - 1)
some_nodes = st.sets(nodes, max_size=3)
sizes = st.integers(0, 5).map(lambda nars: nars * 125)
policies = st.one_of(
    st.builds(policy, max_age=st.integers(0, 40).map(lambda hours: hours * HOUR)),
    st.builds(policy, max_size=sizes),
    st.builds(policy, max_age=st.integers(0, 40).map(lambda hours: hours * HOUR), max_size=sizes),
)
moments = st.integers(0, 25)


def name_of(node: int) -> str:
    return f"package-{node}"


class CollectMachine(RuleBasedStateMachine):
    """`references` of what the model has, and when that was used last."""

    def __init__(self, open_storage: Callable[[], ObjectStore] = MemoryStore) -> None:
        super().__init__()
        self.clock = Clock()
        self.patched = self.clock.in_force()
        self.patched.start()
        self.runner = asyncio.Runner()
        self.opened = AsyncExitStack()
        self.stores: Stores = self.run(self.opened.enter_async_context(open_stores(open_storage)))
        self.references: dict[str, frozenset[str]] = {}
        self.used: dict[str, int] = {}
        self.leased: dict[str, int] = {}
        self.pinned: dict[int, list[str]] = {}

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.opened.aclose())
        self.runner.close()
        self.patched.stop()

    @property
    def now(self) -> int:
        return int(self.clock.now)

    def sample(self, node: int, references: set[int]) -> Sample:
        """Paths refer to those with smaller numbers, as far as these are there."""
        known = self.references.get(name_of(node))
        names = {name_of(r) for r in references if r < node} & self.references.keys() if known is None else known
        paths = tuple(sorted((path_of(name) for name in names), key=lambda path: path.base_name))
        return Sample(name_of(node), b"%d" % (node % CONTENTS), paths)

    async def with_process(self, work: Callable[[Process], Awaitable[None]], gate: Gate | None = None) -> bool:
        """Whether it was done, and not ended by the gate."""
        process = Process(self.stores.through(gate) if gate else self.stores)
        try:
            await work(process)
        except StoreError:
            assert gate is not None
            return False
        finally:
            await process.end()
        return True

    @rule(hours=st.integers(1, 30))
    def pass_time(self, hours: int) -> None:
        self.clock.pass_(hours * HOUR + 1)

    @rule(node=nodes, references=some_nodes)
    def push(self, node: int, references: set[int]) -> None:
        self.clock.pass_(1)
        sample = self.sample(node, references)
        try:
            self.run(self.with_process(lambda process: process.push(MAIN, sample)))
        except BeingRemoved:
            return
        self.note_push(sample)

    def note_push(self, sample: Sample) -> None:
        before = self.used.get(sample.name)
        if sample.name not in self.references or before is None or before < self.now - HOUR:
            self.used[sample.name] = self.now
        self.references[sample.name] = frozenset(path.name for path in sample.references)

    @rule(node=nodes)
    def send_only(self, node: int) -> None:
        """An uploader that goes away before it publishes; one that comes while a NAR is being removed is sent away."""
        with suppress(BeingRemoved):
            self.run(self.with_process(lambda process: process.send(MAIN, self.sample(node, set()))))

    @rule(used=some_nodes)
    def use(self, used: set[int]) -> None:
        self.clock.pass_(1)
        names = {name_of(node) for node in used}
        self.run(self.stores.catalog.touch("main", {path_of(name).hash_part: self.now for name in names}))
        self.used.update(dict.fromkeys(names & self.references.keys(), self.now))

    @rule(node=nodes)
    def look_up(self, node: int) -> None:
        async def ask(process: Process) -> None:
            answer = await process.find(MAIN, self.sample(node, set()))
            assert (answer is not None) == (name_of(node) in self.references)

        self.run(self.with_process(ask))

    @rule(asked=some_nodes)
    def lease(self, asked: set[int]) -> None:
        samples = [self.sample(node, set()) for node in asked]
        self.run(self.with_process(lambda process: process.grant(MAIN, *samples)))
        for sample in samples:
            if sample.name in self.references:
                self.leased[sample.name] = self.now + LEASE

    @rule(pin=st.integers(0, 1), node=nodes, keep=st.integers(1, 2))
    def point(self, pin: int, node: int, keep: int) -> None:
        base_name = path_of(name_of(node)).base_name
        try:
            self.run(
                self.stores.catalog.pin(
                    "main", str(pin), base_name, keep=keep, expires_at=None, at=self.now, by="machine"
                )
            )
        except NotFound:
            assert name_of(node) not in self.references
            return
        latest = self.pinned.get(pin, [])
        if latest[:1] != [name_of(node)]:
            latest = [name_of(node), *latest]
        self.pinned[pin] = latest[:keep]

    @rule(pin=st.integers(0, 1))
    def unpin(self, pin: int) -> None:
        assert self.run(self.stores.catalog.unpin("main", str(pin))) == (self.pinned.pop(pin, None) is not None)

    @rule(by=policies)
    def collect(self, by: Any) -> None:
        self.clock.pass_(1)
        expected = self.kept(by)

        async def collect(process: Process) -> None:
            rehearsed, _ = await process.collect(CACHES, {"main": by}, dry_run=True, nar_grace=GRACE)
            report, _ = await process.collect(CACHES, {"main": by}, nar_grace=GRACE)
            assert report.paths == rehearsed.paths == len(self.references) - len(expected)

        self.run(self.with_process(collect))
        self.forget_all_but(expected)
        assert self.run(names_in(self.stores, MAIN)) == expected

    @rule(by=policies, at=moments, late=st.booleans())
    def collect_and_die(self, by: Any, at: int, late: bool) -> None:
        self.clock.pass_(1)
        expected = self.kept(by)

        async def collect() -> None:
            gate = Gate(at, die, late=late)
            await self.with_process(
                lambda process: _no_result(process.collect(CACHES, {"main": by}, nar_grace=0)), gate
            )

        self.run(collect())
        there = self.run(names_in(self.stores, MAIN))
        assert expected <= there <= self.references.keys()
        self.forget_all_but(there)

    @rule(node=nodes, references=some_nodes, at=moments, late=st.booleans())
    def push_and_die(self, node: int, references: set[int], at: int, late: bool) -> None:
        self.clock.pass_(1)
        sample = self.sample(node, references)

        async def push() -> bool:
            gate = Gate(at, die, late=late)
            return await self.with_process(lambda process: process.push(MAIN, sample), gate)

        done = self.run(push())
        if done or sample.name in self.run(names_in(self.stores, MAIN)):
            self.note_push(sample)
            record = self.run(self.stores.catalog.uses("main", self.now))
            assert record
            self.read_uses()

    @rule(by=policies, node=nodes, references=some_nodes, at=moments, late=st.booleans())
    def push_in_the_middle_of_a_collection(self, by: Any, node: int, references: set[int], at: int, late: bool) -> None:
        """What was acknowledged is there afterwards, whatever the collection had planned."""
        self.clock.pass_(1)
        sample = self.sample(node, references)
        pushed: list[bool] = []

        async def push() -> None:
            pushed.append(await self.try_to_push(sample))
            await check_consistency(self.stores, CACHES)

        async def collect() -> None:
            gate = Gate(at, push, late=late)
            await self.with_process(
                lambda process: _no_result(process.collect(CACHES, {"main": by}, nar_grace=0)), gate
            )

        self.run(collect())
        there = self.run(names_in(self.stores, MAIN))
        if any(pushed):
            self.note_push(sample)
            assert sample.name in there
        self.forget_all_but(there)
        self.read_uses()

    @rule(by=policies, node=nodes, references=some_nodes, at=moments, late=st.booleans())
    def collect_in_the_middle_of_a_push(self, by: Any, node: int, references: set[int], at: int, late: bool) -> None:
        """A push may be refused for what has gone; if it is not, its path is there."""
        self.clock.pass_(1)
        sample = self.sample(node, references)
        failures: list[CachesrvError] = []

        async def collect() -> None:
            async def work(process: Process) -> None:
                await process.collect(CACHES, {"main": by}, nar_grace=0)

            await self.with_process(work)
            await check_consistency(self.stores, CACHES)

        async def push(process: Process) -> None:
            try:
                await process.push(MAIN, sample)
            except (MissingReferences, MissingNar) as error:
                failures.append(error)

        async def both() -> bool:
            return await self.with_process(push, Gate(at, collect, late=late))

        done = self.run(both())
        there = self.run(names_in(self.stores, MAIN))
        if done and not failures:
            self.note_push(sample)
            assert sample.name in there
        self.forget_all_but(there)
        self.read_uses()

    async def try_to_push(self, sample: Sample) -> bool:
        """Whether it was acknowledged; who is told to try again does so later."""
        process = Process(self.stores, tries=1)
        try:
            await process.push(MAIN, sample)
        except (MissingReferences, MissingNar, StoreError):
            return False
        finally:
            await process.end()
        return True

    def kept(self, by: Any) -> set[str]:
        """What the cache is to hold after a collection: roots, and then what was used last as long as it fits."""
        roots = {name for latest in self.pinned.values() for name in latest}
        roots |= {name for name, until in self.leased.items() if until > self.now}
        roots |= {name for name in self.references if self.used[name] > self.now - LEASE}
        kept = set(closure(self.references, roots))
        for name in sorted(self.references, key=lambda name: self.used[name], reverse=True):
            more = kept | set(closure(self.references, {name}))
            if by.max_age is not None and self.used[name] < self.now - by.max_age:
                break
            if by.max_size is not None and more != kept and self.size(more) > by.max_size:
                break
            kept = more
        return kept

    def size(self, names: set[str]) -> int:
        contents = {int(name.rpartition("-")[2]) % CONTENTS for name in names}
        return sum(len(Sample("x", b"%d" % content).file) for content in contents)

    def forget_all_but(self, there: set[str]) -> None:
        self.references = {name: references for name, references in self.references.items() if name in there}
        for known in (self.used, self.leased):
            for name in known.keys() - there:
                del known[name]

    def read_uses(self) -> None:
        """Where a push came in the middle, it is not for the model to say when that was."""
        uses = self.run(self.stores.catalog.uses("main", self.now))
        summaries = self.run(self.stores.catalog.summaries("main", [use.number for use in uses]))
        self.used.update({summary.name: summary.used_at for summary in summaries})

    @invariant()
    def what_is_visible_is_whole(self) -> None:
        self.run(check_consistency(self.stores, CACHES))
        assert self.run(names_in(self.stores, MAIN)) == self.references.keys()
        assert len(self.run(nars_in(self.stores))) <= CONTENTS


async def _no_result(work: Awaitable[Any]) -> None:
    await work


TestCollectMachine = CollectMachine.TestCase
TestCollectMachine.settings = settings(derandomize=True, max_examples=40, stateful_step_count=25, deadline=None)


def test_the_same_in_a_bucket(gateway: Gateway, bucket: str) -> None:
    session = gateway.session()

    def open_storage() -> ObjectStore:
        requests = Retrying(Limited(Direct()))
        return S3Store(bucket, requests=requests, endpoint=gateway.endpoint, prefix=token_hex(8), session=session)

    class InABucket(CollectMachine):
        def __init__(self) -> None:
            super().__init__(open_storage)

    few = settings(derandomize=True, max_examples=6, stateful_step_count=15, deadline=None)
    run_state_machine_as_test(InABucket, settings=few)
