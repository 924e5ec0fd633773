"""Hashes in all their forms."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import BadInput
from cachesrv.nix.hashes import SIZES, Hash
from tests.strategies import hashes

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "hashes.json").read_text())
EMPTY = Hash.of("sha256", b"")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['algorithm']}-{vector['text']}")
def test_the_forms_are_those_of_nix(vector: dict[str, str]) -> None:
    algorithm = vector["algorithm"]
    value = Hash.of(algorithm, vector["text"].encode())
    assert value.nix32 == f"{algorithm}:{vector['nix32']}"
    assert value.bare_nix32 == vector["nix32"]
    assert value.base16 == f"{algorithm}:{vector['base16']}"
    assert value.sri == vector["sri"]
    for form in ("base16", "nix32", "base64"):
        assert Hash.parse(f"{algorithm}:{vector[form]}") == value
        assert Hash.parse(vector[form], algorithm) == value
    assert Hash.parse(vector["sri"]) == value


@given(hashes())
def test_every_form_is_read_back(value: Hash) -> None:
    for text in (value.nix32, value.base16, value.base16.replace(value.digest.hex(), value.digest.hex().upper())):
        assert Hash.parse(text) == value
        assert Hash.parse(text, value.algorithm) == value
    assert Hash.parse(value.sri) == value
    assert Hash.parse(value.bare_nix32, value.algorithm) == value


@given(st.text() | st.text("sha256:-" + EMPTY.digest.hex(), max_size=80), st.sampled_from([None, *SIZES]))
def test_any_text_is_a_hash_or_bad_input(text: str, algorithm: str | None) -> None:
    try:
        value = Hash.parse(text, algorithm)
    except BadInput:
        return
    assert Hash.parse(value.nix32) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        "sha256-",
        "blake3:" + EMPTY.digest.hex(),
        "SHA256:" + EMPTY.digest.hex(),
        "sha256:" + EMPTY.digest.hex()[1:],
        "sha256: " + EMPTY.digest.hex()[1:],
        "sha256:" + EMPTY.digest.hex()[:-2] + "  ",
        "sha256:" + EMPTY.digest.hex()[:-1] + "é",
        "sha1:" + EMPTY.digest.hex(),
        "sha256:" + EMPTY.sri,
        EMPTY.sri.rstrip("="),
        EMPTY.sri + "=",
        EMPTY.sri[:-2] + "V=",
        EMPTY.sri[:-5] + "\n" + EMPTY.sri[-5:],
        "sha256-" + EMPTY.digest.hex(),
        "sha512-" + EMPTY.sri.partition("-")[2],
    ],
)
def test_what_is_no_hash_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Hash.parse(text)


def test_an_algorithm_must_be_known_from_somewhere_and_agree() -> None:
    with pytest.raises(BadInput, match="does not begin with its algorithm"):
        Hash.parse(EMPTY.bare_nix32)
    with pytest.raises(BadInput, match="is not of sha512"):
        Hash.parse(EMPTY.nix32, "sha512")
    with pytest.raises(BadInput, match="not a hash algorithm"):
        Hash.of("crc32", b"")


def test_a_digest_has_the_size_of_its_algorithm() -> None:
    with pytest.raises(BadInput, match="19 bytes"):
        Hash("sha1", bytes(19))


def test_messages_stay_short_whatever_the_input() -> None:
    with pytest.raises(BadInput) as caught:
        Hash.parse("sha256:" + "x" * 10**6)
    assert len(str(caught.value)) < 300
