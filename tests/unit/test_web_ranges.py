"""Range requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.storage.base import ByteRange
from cachesrv.web.ranges import Unsatisfiable, matches, range_holds, requested


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-", 0, 100),
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=0-100", 0, 100),
        ("bytes=10-19", 10, 20),
        ("bytes=99-", 99, 100),
        ("bytes=-1", 99, 100),
        ("bytes=-100", 0, 100),
        ("bytes=-101", 0, 100),
        ("bytes=5-9999999999999999999", 5, 100),
    ],
)
def test_parts(header: str, start: int, end: int) -> None:
    assert requested(header, 100) == ByteRange(start, end)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=0-1,3-4",
        "bytes=0-1,",
        "lines=1-2",
        "bytes=0-1 ",
        " bytes=0-1",
        "bytes= 0-1",
        "bytes=+1-2",
        "bytes=1-2\n",
        "bytes=٣-٤",
        "bytes=12345678901234567890-",
    ],
)
def test_what_is_passed_over(header: str | None) -> None:
    assert requested(header, 100) is None


@pytest.mark.parametrize(
    ("header", "size"),
    [("bytes=100-", 100), ("bytes=100-200", 100), ("bytes=-0", 100), ("bytes=0-", 0), ("bytes=-5", 0)],
)
def test_beyond_the_end(header: str, size: int) -> None:
    with pytest.raises(Unsatisfiable) as caught:
        requested(header, size)
    assert caught.value.size == size


@given(
    st.text(alphabet="bytes=-0123456789, ") | st.from_regex(r"bytes=[0-9]{0,5}-[0-9]{0,5}", fullmatch=True),
    st.integers(0, 10_000),
)
def test_whatever_is_asked_lies_within(header: str, size: int) -> None:
    try:
        part = requested(header, size)
    except Unsatisfiable:
        return
    assert part is None or 0 <= part.start < part.end <= size


@pytest.mark.parametrize(
    ("header", "matching"),
    [
        (None, False),
        ("", False),
        ('"a"', True),
        ('W/"a"', True),
        ('"b"', False),
        ('"b", "a"', True),
        ('"b","a"', True),
        ("*", True),
        ("a", False),
        ('"b", *', True),
    ],
)
def test_if_none_match(header: str | None, matching: bool) -> None:
    assert matches(header, '"a"') == matching


@pytest.mark.parametrize(
    ("header", "etag", "holds"),
    [
        (None, '"a"', True),
        (None, None, True),
        ('"a"', '"a"', True),
        ('"b"', '"a"', False),
        ('W/"a"', '"a"', False),
        ('"a"', None, False),
        ("Sat, 21 Nov 2026 06:00:00 GMT", '"a"', False),
    ],
)
def test_if_range(header: str | None, etag: str | None, holds: bool) -> None:
    assert range_holds(header, etag) == holds
