"""Path infos in reference order."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.nix.store_path import StorePath

NAR_HASH = Hash.of("sha256", b"")


def path(number: int) -> StorePath:
    return StorePath(f"{number:032d}", "x")


def infos(references: Mapping[int, set[int]]) -> list[PathInfo]:
    return [
        PathInfo(path(number), NAR_HASH, 120, tuple(path(other) for other in sorted(others)))
        for number, others in references.items()
    ]


@st.composite
def graphs(draw: st.DrawFn) -> dict[int, set[int]]:
    """Numbers refer to smaller ones and themselves, under names that have nothing to do with that order."""
    names = draw(st.permutations(range(12)))
    return {name: draw(st.sets(st.sampled_from(names[: index + 1]), max_size=4)) for index, name in enumerate(names)}


@given(graphs(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_each_path_stands_behind_its_references_and_the_order_is_always_the_same(
    graph: dict[int, set[int]], chance: random.Random
) -> None:
    given_infos = infos(graph)
    ordered = in_reference_order(given_infos)
    assert sorted(info.store_path for info in ordered) == sorted(info.store_path for info in given_infos)
    seen: set[StorePath] = set()
    for info in ordered:
        assert set(info.references) <= seen | {info.store_path}
        seen.add(info.store_path)
    chance.shuffle(given_infos)
    assert in_reference_order(given_infos) == ordered


def test_references_to_others_do_not_count() -> None:
    ordered = in_reference_order(infos({2: {1, 9}, 1: {9}}))
    assert [info.store_path for info in ordered] == [path(1), path(2)]


def test_a_cycle_is_bad_input() -> None:
    with pytest.raises(BadInput, match="cycle"):
        in_reference_order(infos({1: {2}, 2: {3}, 3: {1}}))


def test_a_long_chain_needs_no_recursion() -> None:
    chain = {number: {number + 1} for number in range(20_000)} | {20_000: set[int]()}
    assert in_reference_order(infos(chain))[0].store_path == path(20_000)
