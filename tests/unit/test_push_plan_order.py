"""When paths may be published: after their NARs, and after all they refer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.push.publish_order import PublishOrder
from tests.push_doubles import path_info

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

    assert taken(order, most_paths=1) == ["base"]
    assert taken(order, most_references=1) == ["left"]
    assert taken(order, most_references=1) == ["top"]


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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.randoms(use_true_random=False))
def test_any_order_of_events_publishes_every_path_after_its_references(size: int, chance: random.Random) -> None:
    infos = _closure(size, chance)
    order = PublishOrder(infos)
    nars = list(infos)
    chance.shuffle(nars)
    published: list[PathInfo] = []
    failed: set[PathInfo] = set()

    while not order.is_done:
        if nars and chance.random() < 0.6:
            info = nars.pop()
            if order.is_open(info.store_path):
                if chance.random() < 0.1:
                    failed.add(info)
                    hopeless = order.settle([], [info.store_path])
                    failed.update(other for other in infos if other.store_path in hopeless)
                else:
                    order.nar_is_there(info.store_path)
        batch = order.take(chance.randint(1, 5), 1000)
        for info in batch:
            assert {p for p in info.references if p != info.store_path} <= {done.store_path for done in published}
            published.append(info)
        order.settle([info.store_path for info in batch], [])

    assert failed.isdisjoint(published)
    assert len(failed) + len(published) == size


def _closure(size: int, chance: random.Random) -> list[PathInfo]:
    infos: list[PathInfo] = []
    for number in range(size):
        others = chance.sample(range(number), k=min(number, chance.randint(0, 3)))
        infos.append(path_info(f"path-{number}", [f"path-{other}" for other in others]))
    return infos
