"""When paths may be published: after their NARs, and after all they refer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.push.publish_order import PublishOrder
from tests.push_doubles import path_info, store_path

if TYPE_CHECKING:
    import random

    from cachesrv.nix.path_info import PathInfo

BASE = path_info("base")
LEFT = path_info("left", ["base", "left", "elsewhere"])
TOP = path_info("top", ["left", "base"])
CHAIN = [BASE, LEFT, TOP]


def taken(order: PublishOrder, most_paths: int = 100, most_references: int = 1000) -> list[str]:
    return [info.store_path.name for info in order.take(most_paths, most_references)]


def test_a_path_waits_for_its_nar_and_for_its_references() -> None:
    order = PublishOrder(CHAIN)
    order.nar_is_there(TOP.store_path)
    assert not order.is_ready

    order.nar_is_there(BASE.store_path)
    assert taken(order) == ["base"]

    order.nar_is_there(LEFT.store_path)
    assert taken(order) == [], "what it refers to is on its way, and may fail"
    order.settle([BASE.store_path], [])
    assert taken(order) == ["left", "top"]


def test_what_is_ready_goes_together() -> None:
    order = PublishOrder(CHAIN)
    for info in CHAIN:
        order.nar_is_there(info.store_path)

    assert taken(order) == ["base", "left", "top"]
    order.settle([info.store_path for info in CHAIN], [])
    assert order.is_done


def test_a_request_has_its_limits() -> None:
    order = PublishOrder(CHAIN)
    for info in CHAIN:
        order.nar_is_there(info.store_path)

    for most_paths, most_references, name in ((1, 1000, "base"), (100, 1, "left"), (100, 1, "top")):
        assert taken(order, most_paths, most_references) == [name]
        order.settle([store_path(name)], [])


def test_a_request_may_bring_nars() -> None:
    order = PublishOrder(CHAIN)
    order.nar_is_there(TOP.store_path)
    assert [info.store_path.name for info in order.take(100, 1000, [BASE.store_path])] == ["base"]
    order.nar_is_there(BASE.store_path)
    assert not order.is_ready, "it is on its way"
    assert [info.store_path.name for info in order.take(100, 1000, [LEFT.store_path])] == []

    order.settle([BASE.store_path], [])
    assert not order.is_ready, "the request with its NAR has not been answered"
    order.nar_is_there(LEFT.store_path)
    assert taken(order) == ["left", "top"]


def test_what_was_put_back_waits_for_its_references_again() -> None:
    order = PublishOrder(CHAIN)
    assert len(order.take(100, 1000, [info.store_path for info in CHAIN])) == 3
    for info in CHAIN:
        order.nar_is_there(info.store_path)
    for info in reversed(CHAIN):
        order.put_back(info.store_path)
    assert taken(order, most_paths=1) == ["base"]
    assert taken(order) == []
    order.settle([BASE.store_path], [])
    assert taken(order) == ["left", "top"]


def test_what_refers_to_a_failure_fails_with_it() -> None:
    order = PublishOrder(CHAIN)
    order.nar_is_there(LEFT.store_path)

    assert order.settle([], [BASE.store_path]) == {LEFT.store_path: BASE.store_path, TOP.store_path: BASE.store_path}
    assert order.is_done
    assert taken(order) == []


def test_the_server_has_the_last_word_about_what_it_was_sent() -> None:
    order = PublishOrder(CHAIN)
    for info in CHAIN:
        order.nar_is_there(info.store_path)
    taken(order)

    hopeless = order.settle([LEFT.store_path], [BASE.store_path])

    assert hopeless == {TOP.store_path: BASE.store_path}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 25), st.randoms(use_true_random=False))
def test_any_order_of_events_publishes_every_path_after_its_references(size: int, chance: random.Random) -> None:
    push = _Push(_closure(size, chance), chance)
    while not push.order.is_done:
        if push.nars and chance.random() < 0.3:
            push.bring(push.nars.pop())
        if len(push.under_way) < 3:
            push.send()
        if chance.random() < 0.5:
            push.hear()

    assert push.failed.isdisjoint(push.published)
    assert len(push.failed) + len(push.published) == len(push.failed | set(push.published)) == size


class _Push:
    """Several requests under way, which bring NARs or do not, answered in any order, in part sent back."""

    def __init__(self, infos: list[PathInfo], chance: random.Random) -> None:
        self.order = PublishOrder(infos)
        self.nars = chance.sample(infos, len(infos))
        self.published: list[PathInfo] = []
        self.failed: set[PathInfo] = set()
        self.under_way: list[tuple[list[PathInfo], list[PathInfo]]] = []
        self._infos = infos
        self._chance = chance

    def bring(self, info: PathInfo) -> None:
        if not self.order.is_open(info.store_path):
            return
        if self._chance.random() < 0.1:
            hopeless = self.order.settle([], [info.store_path])
            self.failed.add(info)
            self.failed.update(other for other in self._infos if other.store_path in hopeless)
        else:
            self.order.nar_is_there(info.store_path)

    def send(self) -> None:
        brought = [self.nars.pop() for _ in range(min(len(self.nars), self._chance.randint(0, 4)))]
        batch = self.order.take(self._chance.randint(1, 5), 1000, [info.store_path for info in brought])
        for place, info in enumerate(batch):
            there = {done.store_path for done in [*self.published, *batch[:place], info]}
            assert there.issuperset(info.references)
        self.under_way.append((brought, batch))

    def hear(self) -> None:
        brought, batch = self.under_way.pop(self._chance.randrange(len(self.under_way)))
        for info in brought:
            self.bring(info)
        good = [info for info in batch if self.order.is_open(info.store_path)]
        done = good[: self._chance.randint(0, len(good))] if self._chance.random() < 0.3 else good
        self.published += done
        self.order.settle([info.store_path for info in done], [])
        for info in batch:
            self.order.put_back(info.store_path)


def _closure(size: int, chance: random.Random) -> list[PathInfo]:
    infos: list[PathInfo] = []
    for number in range(size):
        others = chance.sample(range(number), k=min(number, chance.randint(0, 3)))
        infos.append(path_info(f"path-{number}", [f"path-{other}" for other in others]))
    return infos
