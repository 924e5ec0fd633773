from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import StoreError
from cachesrv.index.base import Absent, Present, decode, encode_absent, encode_present, lookup_key, storage_key

NOW = 1_700_000_000
ANSWER = Present(b"Content-Length: 4\r\n\r\n", b"body")


@given(head=st.binary(max_size=300), body=st.binary(max_size=300))
def test_answers_round_trip(head: bytes, body: bytes) -> None:
    assert decode(encode_present(Present(head, body)), NOW) == Present(head, body)


@given(until=st.integers(0, 2**64 - 1))
def test_absences_round_trip_until_they_end(until: int) -> None:
    assert decode(encode_absent(until), NOW) == (Absent(until) if until > NOW else None)


@given(value=st.binary(max_size=40))
def test_any_bytes_are_a_value_or_an_error_of_the_store(value: bytes) -> None:
    with contextlib.suppress(StoreError):
        decode(value, NOW)


def test_values_that_no_index_wrote_are_an_error_of_the_store() -> None:
    whole = encode_present(ANSWER)
    for value in (b"", b"\0", b"\3abc", whole[:2], whole[: 3 + len(ANSWER.head) - 1], encode_absent(NOW) + b"x"):
        with pytest.raises(StoreError):
            decode(value, NOW)


@given(cache=st.text(max_size=20), hash_part=st.text(max_size=40))
def test_a_name_that_cannot_be_stored_never_finds_one_that_can(cache: str, hash_part: str) -> None:
    key = lookup_key(cache, hash_part)
    stored = storage_key("main", "syd87l2rxw8cbsxmxl853h0r6pdwhwjr")
    assert key != stored or (cache, hash_part) == ("main", "syd87l2rxw8cbsxmxl853h0r6pdwhwjr")
