"""Framing of integers, strings and lists."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix import wire

# What Nix writes for an empty string, "hi" and the set of "foo" and "bar".
EMPTY = bytes(8)
HI = bytes.fromhex("0200000000000000 6869000000000000")
FOO_BAR = bytes.fromhex("0200000000000000 0300000000000000 6261720000000000 0300000000000000 666f6f0000000000")


def test_strings_are_padded_to_eight_bytes() -> None:
    assert wire.encode_string("") == EMPTY
    assert wire.encode_string("hi") == HI
    assert wire.encode_string(b"12345678") == bytes.fromhex("0800000000000000 3132333435363738")
    assert len(wire.encode_string("123456789")) == 24


def test_lists_are_a_count_and_the_items_in_the_order_given() -> None:
    assert wire.encode_strings(["bar", "foo"]) == FOO_BAR
    assert wire.encode_strings(()) == EMPTY


def test_length_is_of_bytes_not_characters() -> None:
    assert wire.encode_string("ü") == bytes.fromhex("0200000000000000 c3bc000000000000")
    assert wire.decode(wire.read_string(), wire.encode_string("ü")) == "ü"


@given(st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_numbers_come_back(number: int) -> None:
    assert wire.decode(wire.read_u64(), wire.encode_u64(number)) == number


@given(st.lists(st.text(max_size=40), max_size=20))
@example(["", "a" * 8, "b" * 9])
@settings(max_examples=50)
def test_lists_come_back(texts: list[str]) -> None:
    assert wire.decode(wire.read_strings(), wire.encode_strings(texts)) == texts


@pytest.mark.parametrize(("data", "value"), [(0, False), (1, True), (2, True), (2**63, True)])
def test_any_number_but_zero_is_true(data: int, value: bool) -> None:
    assert wire.decode(wire.read_bool(), wire.encode_u64(data)) is value


@pytest.mark.parametrize("at", range(2, 8))
def test_padding_must_be_zeros(at: int) -> None:
    padding = bytearray(HI)
    padding[8 + at] = 1
    with pytest.raises(BadInput, match="padded"):
        wire.decode(wire.read_string(), bytes(padding))


def test_strings_must_be_utf_8_where_text_is_wanted() -> None:
    data = wire.encode_string(b"\xff\xfe")
    assert wire.decode(wire.read_bytes(), data) == b"\xff\xfe"
    with pytest.raises(BadInput, match="UTF-8"):
        wire.decode(wire.read_string(), data)


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_are_asked_for() -> None:
    for length in (11, 2**60, 2**64 - 1):
        reading = wire.read_bytes(limit=10)
        assert next(reading) == 8
        with pytest.raises(TooLarge, match=str(length)):
            reading.send(wire.encode_u64(length))


def test_a_string_at_the_limit_is_read() -> None:
    assert wire.decode(wire.read_bytes(limit=10), wire.encode_string("x" * 10)) == b"x" * 10


def test_a_count_beyond_the_limit_is_refused_at_once() -> None:
    reading = wire.read_strings()
    next(reading)
    with pytest.raises(TooLarge):
        reading.send(wire.encode_u64(2**60))


def test_all_strings_of_a_list_share_one_limit() -> None:
    texts = ["x" * 92] * 10
    assert wire.decode(wire.read_strings(limit=1000), wire.encode_strings(texts)) == texts
    with pytest.raises(TooLarge):
        wire.decode(wire.read_strings(limit=999), wire.encode_strings(texts))


@pytest.mark.parametrize("end", range(len(FOO_BAR)))
def test_data_that_ends_early_is_bad_input(end: int) -> None:
    with pytest.raises(BadInput, match=f"ends after {end} bytes"):
        wire.decode(wire.read_strings(), FOO_BAR[:end])


def test_bytes_behind_the_value_are_left_alone() -> None:
    assert wire.decode(wire.read_string(), HI + b"rest") == "hi"


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_give_a_list_or_bad_input(data: bytes) -> None:
    try:
        texts = wire.decode(wire.read_strings(), data)
    except BadInput:
        return
    assert data.startswith(wire.encode_strings(texts))
