"""Memory of the NAR reader, whatever a NAR says of itself."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cachesrv.errors import BadInput
from cachesrv.nix.nar import CLOSE, CONTENTS, DIRECTORY, ENTRY, MAGIC, NODE, REGULAR, SYMLINK, NarReader, token


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def read(data: bytes) -> None:
    reader = NarReader()
    for start in range(0, len(data), 10_000):
        reader.feed(data[start : start + 10_000])
    reader.finish()


@pytest.mark.parametrize("size", [2**60, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "head",
    [MAGIC + REGULAR + CONTENTS, MAGIC + SYMLINK, MAGIC + DIRECTORY + ENTRY, b""],
    ids=["contents", "target", "name", "magic"],
)
def test_a_promised_size_allocates_nothing(head: bytes, size: int) -> None:
    data = head + size.to_bytes(8, "little") + b"x" * 100_000
    with at_most(300_000), pytest.raises(BadInput):
        read(data)


def test_contents_are_skipped_without_being_kept() -> None:
    block = bytes(1024 * 1024)
    head = MAGIC + REGULAR + CONTENTS + (64 * len(block)).to_bytes(8, "little")
    reader = NarReader()
    with at_most(50_000):
        reader.feed(head)
        for _ in range(64):
            reader.feed(block)
        reader.feed(CLOSE)
        reader.finish()
    assert reader.size == len(head) + 64 * len(block) + len(CLOSE)


def test_a_listing_does_not_grow_beyond_its_limit() -> None:
    reader = NarReader(max_entries=1000)
    with at_most(1_000_000):
        reader.feed(MAGIC + DIRECTORY)
        for number in range(6000):
            link = SYMLINK + token(b"%d" % number * 100) + CLOSE
            reader.feed(ENTRY + token(b"%020d" % number) + NODE + link + CLOSE)
        reader.feed(CLOSE)
        reader.finish()
    assert reader.root is None
