from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import BadInput, StoreError
from cachesrv.index.base import Absent, Present, decode, encode_absent, encode_present, head_of, lookup_key, storage_key

NOW = 1_700_000_000
ANSWER = Present(b"Content-Length: 4\r\n\r\n", b"body")


@given(fields=st.binary(max_size=300).filter(lambda fields: b"\r\n\r\n" not in fields), body=st.binary(max_size=300))
def test_answers_round_trip(fields: bytes, body: bytes) -> None:
    answer = Present(b"A" + fields.rstrip(b"\r\n") + b"\r\n\r\n", body)
    assert decode(encode_present(answer), NOW) == answer
    assert head_of(encode_present(answer)) == answer.head


@given(head=st.binary(max_size=40), body=st.binary(max_size=10))
def test_what_is_stored_is_what_is_read_or_refused(head: bytes, body: bytes) -> None:
    with contextlib.suppress(BadInput):
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
    for value in (b"", b"\0", b"\3abc", whole[:2], whole[: len(ANSWER.head) - 1], encode_absent(NOW) + b"x"):
        with pytest.raises(StoreError):
            decode(value, NOW)


@given(cache=st.text(max_size=20), hash_part=st.text(max_size=40))
def test_a_name_that_cannot_be_stored_never_finds_one_that_can(cache: str, hash_part: str) -> None:
    key = lookup_key(cache, hash_part)
    stored = storage_key("main", "syd87l2rxw8cbsxmxl853h0r6pdwhwjr")
    assert key != stored or (cache, hash_part) == ("main", "syd87l2rxw8cbsxmxl853h0r6pdwhwjr")
