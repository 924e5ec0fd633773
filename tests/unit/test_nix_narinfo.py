"""Narinfos: written to the byte as Nix does, read with all of its traps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.content_address import ContentAddress
from cachesrv.nix.hashes import Hash
from cachesrv.nix.narinfo import COMPRESSIONS, NarInfo, parse, render
from cachesrv.nix.signing import Signature
from cachesrv.nix.store_path import StorePath
from tests.strategies import narinfos, signatures, store_paths

VECTORS = Path(__file__).parents[1] / "vectors"
FILES = sorted(VECTORS.glob("cache*/*.narinfo"))
EMPTY = Hash.of("sha256", b"")
A = "g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-a"
B = "n5wkd9frr45pa74if5gpz9j7mifg27fh-b"
PATH = "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo"
SIGNATURE = Signature("key-1", bytes(64))

LINES = {
    "StorePath": f"/nix/store/{PATH}",
    "URL": "nar/x.nar.xz",
    "Compression": "xz",
    "FileHash": EMPTY.nix32,
    "FileSize": "77",
    "NarHash": EMPTY.nix32,
    "NarSize": "96",
    "References": f"{A} {B}",
    "Deriver": f"{A}.drv",
    "Sig": SIGNATURE.render(),
    "CA": f"text:{EMPTY.nix32}",
}


def narinfo(*extra: str, **changes: str | None) -> bytes:
    """A narinfo with these lines changed, left out (None) or appended."""
    lines = [f"{key}: {value}" for key, value in (LINES | changes).items() if value is not None]
    return "\n".join([*lines, *extra, ""]).encode("latin-1")


def test_all_fields_are_read() -> None:
    assert parse(narinfo("System: x86_64-linux")) == NarInfo(
        store_path=StorePath.parse(PATH),
        store_dir="/nix/store",
        url="nar/x.nar.xz",
        compression="xz",
        file_hash=EMPTY,
        file_size=77,
        nar_hash=EMPTY,
        nar_size=96,
        references=(StorePath.parse(A), StorePath.parse(B)),
        deriver=StorePath.parse(f"{A}.drv"),
        system="x86_64-linux",
        signatures=(SIGNATURE,),
        ca=ContentAddress.parse(f"text:{EMPTY.nix32}"),
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_nix_wrote_is_written_again_to_the_byte(file: Path) -> None:
    info = parse(file.read_bytes())
    assert info.store_path.hash_part == file.stem
    assert render(info) == file.read_bytes()


def test_there_are_vectors() -> None:
    assert len(FILES) > 20


@given(narinfos)
def test_what_is_written_is_read_back(info: NarInfo) -> None:
    assert parse(render(info)) == info


def test_lines_stand_in_the_order_of_nix() -> None:
    written = render(parse(narinfo("System: x86_64-linux")))
    keys = [line.partition(":")[0] for line in written.decode().splitlines()]
    expected = [*LINES]
    expected.insert(expected.index("Sig"), "System")
    assert keys == expected


def test_what_is_unknown_has_no_line_but_references_always_do() -> None:
    bare = narinfo(FileHash=None, FileSize=None, References="", Deriver=None, Sig=None, CA=None)
    assert render(parse(bare)) == bare
    assert b"\nReferences: \n" in bare
    assert parse(bare) == parse(bare.replace(b"References: \n", b""))


@pytest.mark.parametrize("character", ["\t", ":", "x", "\xff", "\r"])
def test_the_byte_after_the_colon_may_be_any(character: str) -> None:
    assert parse(narinfo().replace(b"URL: ", b"URL:" + character.encode("latin-1"))).url == "nar/x.nar.xz"


@pytest.mark.parametrize("compression", [None, ""])
def test_no_compression_stated_means_bzip2(compression: str | None) -> None:
    info = parse(narinfo(Compression=compression))
    assert info.compression == "bzip2"
    assert b"Compression: bzip2\n" in render(info)


@pytest.mark.parametrize("compression", sorted(COMPRESSIONS))
def test_every_compression_of_nix_is_kept(compression: str) -> None:
    assert parse(narinfo(Compression=compression)).compression == compression


def test_an_unknown_deriver_is_none() -> None:
    assert parse(narinfo(Deriver="unknown-deriver")).deriver is None
    assert parse(narinfo("Deriver: unknown-deriver")).deriver == StorePath.parse(f"{A}.drv")


def test_an_empty_content_address_is_none() -> None:
    assert parse(narinfo(CA="")).ca is None
    assert parse(narinfo(f"CA: text:{EMPTY.nix32}", CA="")).ca == ContentAddress.parse(f"text:{EMPTY.nix32}")


def test_an_empty_system_is_none() -> None:
    assert parse(narinfo("System: ")).system is None


def test_a_file_size_of_zero_is_unknown() -> None:
    assert parse(narinfo(FileSize="0")).file_size is None


def test_references_are_sorted_and_unique() -> None:
    info = parse(narinfo(References=f" {B}  {A} {B} "))
    assert info == parse(narinfo())
    assert f"References: {A} {B}\n".encode() in render(info)


def test_hashes_may_come_in_any_prefixed_form() -> None:
    for text in (EMPTY.base16, EMPTY.sri, EMPTY.sri.replace("-", ":", 1)):
        assert parse(narinfo(FileHash=text, NarHash=text)) == parse(narinfo())


def test_unknown_keys_are_passed_over_whatever_their_bytes() -> None:
    assert parse(narinfo("Colour: \xff\x00é", "url: y", ": z", "\xe9: ", " URL: y")) == parse(narinfo())


def test_of_repeated_keys_the_last_counts() -> None:
    info = parse(
        narinfo(
            f"StorePath: /other/{A}",
            "URL: nar/y.nar",
            "Compression: none",
            "FileSize: 5",
            "NarSize: 6",
            f"Deriver: {B}",
            f"NarHash: {Hash.of('sha256', b'x').nix32}",
        )
    )
    assert (info.full_path, info.url, info.compression) == (f"/other/{A}", "nar/y.nar", "none")
    assert (info.file_size, info.nar_size, info.deriver) == (5, 6, StorePath.parse(B))
    assert info.nar_hash == Hash.of("sha256", b"x")


def test_a_repeated_key_must_be_right_each_time() -> None:
    with pytest.raises(BadInput, match="NarSize"):
        parse(narinfo("NarSize: 96", NarSize="many"))


def test_second_references_are_refused_unless_the_first_were_none() -> None:
    with pytest.raises(BadInput, match="References: they are given twice"):
        parse(narinfo("References: "))
    assert parse(narinfo(f"References: {A}", References="")).references == (StorePath.parse(A),)


def test_a_second_content_address_is_refused() -> None:
    with pytest.raises(BadInput, match="CA: it is given twice"):
        parse(narinfo("CA: "))


def test_signatures_keep_their_order_without_repetition() -> None:
    first, second = Signature("z", bytes(64)), Signature("a", bytes(64))
    info = parse(narinfo(*(f"Sig: {signature}" for signature in (first, second, first)), Sig=None))
    assert info.signatures == (first, second)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        narinfo()[:-1],
        narinfo() + b"\n",
        b"\n" + narinfo(),
        narinfo().replace(b"\nURL", b"\n\nURL"),
        narinfo("no colon"),
        narinfo("Key:"),
        narinfo().replace(b"\n", b"\r\n"),
        narinfo(References=None) + b"References:\n",
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_lines_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(BadInput):
        parse(data)


BAD_VALUES: dict[str, list[str | None]] = {
    "StorePath": [
        None,
        "",
        PATH,
        f"/{PATH}",
        f"/nix/store/{PATH}/",
        f"nix/store/{PATH}",
        f"/a/../{PATH}",
        "/nix/store",
    ],
    "URL": [None, "", "nar/x y", "nar/x\r", "nar/é", "nar/\x00"],
    "Compression": ["XZ", "zip", " "],
    "FileHash": ["", EMPTY.bare_nix32, Hash.of("sha1", b"").nix32, EMPTY.nix32 + " "],
    "FileSize": ["", "-1", "+1", " 1", "1 ", "1_0", "1e3", "0x1", "²", str(2**63), "0" * 20, "9" * 9999],
    "NarHash": [None, "", EMPTY.bare_nix32, Hash.of("sha512", b"").nix32],
    "NarSize": [None, "", "0", "-1", "1.0", str(2**63)],
    "References": [f"/nix/store/{A}", f"{A}\t{B}", "x", f"{A},{B}", A[:33]],
    "Deriver": ["", f"/nix/store/{A}.drv", "unknown"],
    "Sig": ["", "key-1", "key-1:", "key-1:AAAA", ":" + "A" * 86 + "==", SIGNATURE.render() + " "],
    "CA": ["text", EMPTY.nix32, f"fixed:{EMPTY.sri}", f"x:{EMPTY.nix32}"],
    "System": ["\x00", "é", "a\tb"],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in BAD_VALUES.items() for value in values],
    ids=lambda text: ascii(text)[:30],
)
def test_values_that_are_none_are_refused(key: str, value: str | None) -> None:
    with pytest.raises(BadInput) as caught:
        parse(narinfo(**{key: value}))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400


def test_the_largest_sizes_are_taken() -> None:
    info = parse(narinfo(FileSize=str(2**63 - 1), NarSize="0001"))
    assert (info.file_size, info.nar_size) == (2**63 - 1, 1)


def test_size_is_limited() -> None:
    data = narinfo("X: " + "x" * (1 << 20))
    with pytest.raises(TooLarge, match="exceeds the limit of 1048576"):
        parse(data)
    assert parse(data, limit=len(data)) == parse(narinfo())
    with pytest.raises(TooLarge):
        parse(narinfo(), limit=len(narinfo()) - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "x\nSig: y"},
        {"url": ""},
        {"system": "x\nURL: y"},
        {"system": ""},
        {"compression": "rot13"},
        {"store_dir": "/nix\n"},
        {"store_dir": "/nix/store/"},
        {"nar_size": 0},
        {"nar_size": 2**63},
        {"file_size": 0},
        {"file_size": -1},
        {"nar_hash": Hash.of("md5", b"")},
        {"file_hash": Hash.of("sha512", b"")},
    ],
    ids=str,
)
def test_no_value_is_made_that_could_not_be_written(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        replace(parse(narinfo()), **changes)


@given(narinfos, st.lists(store_paths, max_size=4))
def test_the_order_of_references_makes_no_difference(info: NarInfo, references: list[StorePath]) -> None:
    there = replace(info, references=tuple(references))
    back = replace(info, references=tuple(reversed(references * 2)))
    assert there == back
    assert there.fingerprint == back.fingerprint
    assert list(there.references) == sorted(set(references))


@given(narinfos, st.lists(signatures, max_size=3))
def test_signatures_are_added_after_those_there(info: NarInfo, added: list[Signature]) -> None:
    more = info.add_signatures(added)
    assert more.signatures[: len(info.signatures)] == info.signatures
    assert set(more.signatures) == {*info.signatures, *added}
    assert more.add_signatures([*added, *info.signatures]) == more
    assert more.fingerprint == info.fingerprint


def test_signatures_are_replaced_by_name() -> None:
    old, other, new = Signature("a", bytes(64)), Signature("b", bytes(64)), Signature("a", b"\1" * 64)
    info = replace(parse(narinfo()), signatures=(old, other))
    assert info.replace_signatures([new]).signatures == (other, new)
    assert info.replace_signatures([]).signatures == (old, other)


@given(st.binary(max_size=200) | st.lists(st.sampled_from([*map(str, LINES.values()), *LINES, ": ", "\n", ":"])))
def test_any_bytes_are_a_narinfo_or_bad_input(data: bytes | list[str]) -> None:
    check(data if isinstance(data, bytes) else "".join(data).encode())


@settings(max_examples=200)
@given(st.sampled_from(FILES), st.data())
def test_damaged_narinfos_are_read_or_refused(file: Path, data: st.DataObject) -> None:
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 3)))
    check(content[:start] + data.draw(st.binary(max_size=3)) + content[end:])


def check(data: bytes) -> None:
    try:
        info = parse(data)
    except BadInput:
        return
    assert parse(render(info)) == info
