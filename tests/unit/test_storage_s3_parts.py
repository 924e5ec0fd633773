from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.storage.s3_parts import (
    MAX_OBJECT_SIZE,
    MAX_PART_SIZE,
    MAX_PARTS,
    MIN_PART_SIZE,
    content_md5,
    content_type,
    part_size,
)

LEAST = 8 * 2**20


@given(st.integers(0, MAX_OBJECT_SIZE), st.integers(MIN_PART_SIZE, 2**27))
def test_parts_of_an_object_of_known_size(size: int, least: int) -> None:
    """All are equally large, so that any endpoint takes them, and 10,000 are enough."""
    each = part_size(1, size, least)
    assert least <= each <= MAX_PART_SIZE
    assert each == part_size(MAX_PARTS, size, least)
    assert each * MAX_PARTS >= size
    assert each == least or each * (MAX_PARTS - 1) < size + MAX_PARTS


def test_parts_of_an_object_of_unknown_size() -> None:
    sizes = [part_size(number, None, LEAST) for number in range(1, MAX_PARTS + 1)]
    assert sizes == sorted(sizes)
    assert set(sizes[:5000]) == {LEAST}
    assert sizes[5000] == 2 * LEAST
    assert sizes[-1] <= MAX_PART_SIZE
    assert sum(sizes) >= MAX_OBJECT_SIZE
    assert sum(part_size(number, None, MIN_PART_SIZE) for number in range(1, MAX_PARTS + 1)) >= MAX_OBJECT_SIZE


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("nix-cache-info", "text/x-nix-cache-info"),
        ("main/nix-cache-info", "text/x-nix-cache-info"),
        ("main/syd87l2rxw8cbsxmxl853h0r6pdwhwjr.narinfo", "text/x-nix-narinfo"),
        ("p/main/nar/x.nar.zst", "application/x-nix-nar"),
        ("nar/x.nar", "application/x-nix-nar"),
        ("main/log/x.drv", "text/plain; charset=utf-8"),
        ("main/x.ls", "application/json"),
        ("main/realisations/sha256:x!out.doi", "application/json"),
        ("main/build-trace-v2/x.drv/out.doi", "application/json"),
        ("main/debuginfo/abcd.debug", "application/json"),
    ],
)
def test_content_types_are_those_of_nix(key: str, expected: str) -> None:
    assert content_type(key) == expected


async def test_content_md5() -> None:
    assert await content_md5(b"") == "1B2M2Y8AsgTpgAmY7PhCfg=="  # RFC 1864 by way of RFC 1321's first vector
    assert await content_md5(b"a" * 2**20) == await content_md5(bytearray(b"a" * 2**20))
