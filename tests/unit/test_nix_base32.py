"""Nix's base-32 against what `nix hash` wrote, and as a bijection."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput
from cachesrv.nix import base32

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "hashes.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['algorithm']}-{vector['text']}")
def test_digests_are_written_and_read_as_nix_does(vector: dict[str, str]) -> None:
    digest = bytes.fromhex(vector["base16"])
    assert base32.encode(digest) == vector["nix32"]
    assert base32.decode(vector["nix32"]) == digest
    assert base32.decode(vector["nix32"], len(digest)) == digest


@settings(max_examples=5, deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32), min_size=50, max_size=50))
def test_the_installed_nix_agrees(digests: list[bytes]) -> None:
    command = ["nix-hash", "--type", "sha256", "--to-base32", *(digest.hex() for digest in digests)]
    written = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert [base32.encode(digest) for digest in digests] == written


@given(st.binary(max_size=70))
def test_decoding_undoes_encoding(data: bytes) -> None:
    assert base32.decode(base32.encode(data), len(data)) == data


@given(st.text(base32.ALPHABET, max_size=70) | st.text(max_size=10))
def test_each_value_has_one_text(text: str) -> None:
    try:
        data = base32.decode(text)
    except BadInput:
        return
    assert base32.encode(data) == text


def test_no_bytes_are_no_characters() -> None:
    assert base32.encode(b"") == ""
    assert base32.decode("") == b""


@pytest.mark.parametrize("character", "eoutA_ -+\n\0é٣\ud800")
def test_characters_outside_the_alphabet_are_refused(character: str) -> None:
    with pytest.raises(BadInput):
        base32.decode("0" * 51 + character)
    with pytest.raises(BadInput):
        base32.decode(character + "0" * 51)


def test_bits_beyond_the_last_byte_are_refused() -> None:
    assert base32.decode("1" + "0" * 51)[-1] == 0x80
    with pytest.raises(BadInput, match="bits beyond"):
        base32.decode("2" + "0" * 51)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_lengths_that_no_bytes_have_are_refused(length: int) -> None:
    with pytest.raises(BadInput, match="characters"):
        base32.decode("0" * length)


@pytest.mark.parametrize("size", [0, 19, 21, 10**9])
def test_a_length_other_than_the_expected_one_is_refused(size: int) -> None:
    with pytest.raises(BadInput, match=f"{size} bytes"):
        base32.decode("0" * 32, size)
