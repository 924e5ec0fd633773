"""Content addresses: their text, the paths that follow, and contents checked against them."""

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import BadInput, Mismatch, TooLarge
from cachesrv.nix import narinfo
from cachesrv.nix.content_address import ContentAddress, ContentCheck, HashModulo, Method, claims_path, store_path_for
from cachesrv.nix.hashes import Hash
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.store_path import DEFAULT_STORE_DIR, StorePath
from tests.strategies import content_addresses, store_paths

VECTORS = Path(__file__).parents[1] / "vectors"
STORED: list[dict[str, Any]] = json.loads((VECTORS / "store_paths.json").read_text())
NARINFOS = [narinfo.parse(file.read_bytes()) for file in sorted((VECTORS / "cache").glob("*.narinfo"))]
ADDRESSED = [info for info in NARINFOS if info.ca is not None]
OWN = "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0"
OTHER = StorePath("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q", "bar")
EMPTY = Hash.of("sha256", b"")


def nar_of(info: NarInfo) -> bytes:
    """The NAR that the cache in the vectors holds for a path."""
    data = (VECTORS / "cache" / info.url).read_bytes()
    match info.compression:
        case "xz":
            return lzma.decompress(data)
        case "zstd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def contents_of(info: NarInfo, address: ContentAddress) -> bytes:
    """What `address` covers; a NAR of one file has its length at byte 88 and its bytes from 96 on."""
    nar = nar_of(info)
    if address.covers == "nar":
        return nar
    return nar[96 : 96 + int.from_bytes(nar[88:96], "little")]


def by_name(name: str) -> tuple[NarInfo, ContentAddress]:
    """The self-referring or other content-addressed path of this name."""
    info = next(info for info in ADDRESSED if info.store_path.name == name)
    assert info.ca is not None
    return info, info.ca


def test_the_vectors_hold_every_kind() -> None:
    kinds = {(info.ca.method, info.ca.hash.algorithm) for info in ADDRESSED if info.ca}
    algorithms = ("md5", "sha1", "sha256", "sha512")
    fixed = {(method, algorithm) for method in (Method.FLAT, Method.RECURSIVE) for algorithm in algorithms}
    assert kinds == fixed | {(Method.TEXT, "sha256")}
    assert any(info.store_path in info.references for info in ADDRESSED)
    assert any(info.references and info.ca.method is Method.TEXT for info in ADDRESSED if info.ca)


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored["path"][11:])
def test_paths_follow_as_nix_says(stored: dict[str, Any]) -> None:
    path = StorePath.parse_full(stored["path"], DEFAULT_STORE_DIR)
    references = {StorePath.parse_full(text, DEFAULT_STORE_DIR) for text in stored["references"]}
    address = ContentAddress.parse(stored["ca"])
    assert address.render() == stored["ca"]
    assert claims_path(address, path, references, DEFAULT_STORE_DIR)
    own = path in references
    assert store_path_for(address, path.name, references - {path}, DEFAULT_STORE_DIR, self_reference=own) == path


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored["path"][11:])
def test_whatever_else_is_claimed_does_not_hold(stored: dict[str, Any]) -> None:
    path = StorePath.parse_full(stored["path"], DEFAULT_STORE_DIR)
    references = {StorePath.parse_full(text, DEFAULT_STORE_DIR) for text in stored["references"]}
    address = ContentAddress.parse(stored["ca"])
    other_hash = ContentAddress(address.method, Hash.of(address.hash.algorithm, b"else"))
    assert not claims_path(other_hash, path, references, DEFAULT_STORE_DIR)
    assert not claims_path(address, StorePath(path.hash_part, f"{path.name}x"), references, DEFAULT_STORE_DIR)
    assert not claims_path(address, path, references | {OTHER}, DEFAULT_STORE_DIR)
    assert not claims_path(address, path, references ^ {path}, DEFAULT_STORE_DIR)
    assert not claims_path(address, path, references, "/other/store")


def test_a_self_reference_and_another_as_the_manual_of_nix_shows() -> None:
    address = ContentAddress.parse("fixed:r:sha256:1lr187v6dck1rjh2j6svpikcfz53wyl3qrlcbb405zlh13x0khhh")
    path = store_path_for(address, "foo", {OTHER}, DEFAULT_STORE_DIR, self_reference=True)
    assert path.base_name == "n5wkd9frr45pa74if5gpz9j7mifg27fh-foo"


def test_a_fixed_output_by_sha1() -> None:
    address = ContentAddress.parse("fixed:r:sha1:0beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33")
    path = store_path_for(address, "bar", set(), DEFAULT_STORE_DIR)
    assert path.base_name == "mp57d33657rf34lzvlbpfa1gjfv5gmpg-bar"


@given(content_addresses)
def test_the_text_is_read_back(address: ContentAddress) -> None:
    assert ContentAddress.parse(address.render()) == address
    assert ContentAddress.parse(address.method.value + address.hash.base16) == address


@given(st.text() | st.builds("{}:{}".format, st.sampled_from(("text", "fixed", "fixed:r", "fixed:git")), st.text()))
def test_any_text_is_an_address_or_bad_input(text: str) -> None:
    try:
        address = ContentAddress.parse(text)
    except BadInput:
        return
    assert ContentAddress.parse(address.render()) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        EMPTY.nix32,
        f"fixed:{EMPTY.sri}",
        f"fixed:{EMPTY.bare_nix32}",
        f"fixed:x:{EMPTY.nix32}",
        f"text:r:{EMPTY.nix32}",
        f"text:{Hash.of('sha1', b'').nix32}",
        f"fixed:git:{Hash.of('sha512', b'').nix32}",
        f" fixed:{EMPTY.nix32}",
        f"fixed:{EMPTY.nix32} ",
        "fixed:r:blake3:" + "0" * 64,
    ],
)
def test_what_is_no_content_address(text: str) -> None:
    with pytest.raises(BadInput):
        ContentAddress.parse(text)


@given(content_addresses, st.sets(store_paths, max_size=2), st.booleans())
def test_references_are_allowed_where_the_path_can_name_them(
    address: ContentAddress, references: set[StorePath], self_reference: bool
) -> None:
    source = address.method is Method.RECURSIVE and address.hash.algorithm == "sha256"
    allowed = source or (not self_reference and (address.method is Method.TEXT or not references))
    try:
        store_path_for(address, "name", references, DEFAULT_STORE_DIR, self_reference=self_reference)
    except BadInput:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize("info", ADDRESSED, ids=lambda info: info.store_path.base_name)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_contents_of_real_paths_hold(info: NarInfo, chunk: int) -> None:
    assert info.ca is not None
    contents = contents_of(info, info.ca)
    check = ContentCheck(info.ca, info.store_path)
    for start in range(0, len(contents), chunk):
        check.update(memoryview(contents)[start : start + chunk])
    check.finish()


@pytest.mark.parametrize("info", ADDRESSED, ids=lambda info: info.store_path.base_name)
def test_other_contents_do_not(info: NarInfo) -> None:
    assert info.ca is not None
    check = ContentCheck(info.ca, info.store_path)
    check.update(contents_of(info, info.ca) + b"x")
    with pytest.raises(Mismatch, match=info.ca.render()):
        check.finish()


@pytest.mark.parametrize("name", ["floating-program", "program-1.0"])
def test_zeros_in_place_of_a_self_reference_are_not_the_same(name: str) -> None:
    info, address = by_name(name)
    assert info.store_path in info.references
    own = info.store_path.hash_part.encode()
    contents = contents_of(info, address)
    assert own in contents
    check = ContentCheck(address, info.store_path)
    check.update(contents.replace(own, bytes(32)))
    with pytest.raises(Mismatch):
        check.finish()


def test_text_may_not_hold_its_own_hash_part() -> None:
    path = StorePath(OWN, "foo")
    sink = HashModulo("sha256", OWN)
    sink.update(OWN.encode())
    check = ContentCheck(ContentAddress(Method.TEXT, sink.finish()), path)
    check.update(OWN.encode())
    with pytest.raises(Mismatch, match="refers to itself"):
        check.finish()


def test_git_objects_cannot_be_checked() -> None:
    address = ContentAddress(Method.GIT, Hash.of("sha1", b""))
    assert address.covers is None
    with pytest.raises(BadInput, match="cannot be checked"):
        ContentCheck(address, OTHER)


def modulo(data: bytes, own: bytes) -> bytes:
    """The hash modulo self-references, all at once: what the one that streams has to agree with."""
    offsets = []
    while (found := data.find(own)) >= 0:
        offsets.append(found)
        data = data[:found] + bytes(len(own)) + data[found + len(own) :]
    return hashlib.sha256(data + b"".join(b"|%d" % offset for offset in offsets)).digest()


# Pieces of two repeated letters make half occurrences, and ones that overlap.
@given(
    st.sampled_from((OWN, "0" * 32, "01" * 16)),
    st.lists(st.sampled_from((b"", b"0", b"01", b"0" * 31, b"01" * 17, OWN.encode(), OWN[:31].encode(), b"\0|5"))),
    st.lists(st.integers(0, 40)),
)
def test_occurrences_are_found_across_chunks(own: str, pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(pieces)
    sink = HashModulo("sha256", own)
    position = 0
    for cut in cuts:
        sink.update(data[position : position + cut])
        position += cut
    sink.update(data[position:])
    assert sink.finish().digest == modulo(data, own.encode())


def test_without_occurrences_it_is_the_plain_hash() -> None:
    sink = HashModulo("sha512", OWN)
    sink.update(b"data")
    assert sink.finish() == Hash.of("sha512", b"data")
    assert sink.occurrences == 0


def test_occurrences_are_kept_up_to_a_limit() -> None:
    sink = HashModulo("sha256", OWN, limit=3)
    sink.update(OWN.encode() * 3)
    assert sink.occurrences == 3
    with pytest.raises(TooLarge, match="more than 3 times"):
        sink.update(OWN.encode())


def test_only_known_algorithms_hash() -> None:
    with pytest.raises(BadInput):
        HashModulo("crc32", OWN)
