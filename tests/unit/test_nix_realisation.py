"""Realisations of both layouts, and the index of debug information."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix import debuginfo
from cachesrv.nix.debuginfo import DebugInfo, is_build_id
from cachesrv.nix.hashes import Hash
from cachesrv.nix.realisation import (
    OutputId,
    Realisation,
    TracedOutput,
    fingerprints,
    object_name,
    parse_build_trace,
    parse_realisation,
    render,
)
from cachesrv.nix.signing import PublicKey, Signature
from cachesrv.nix.store_path import StorePath

VECTORS = Path(__file__).parents[1] / "vectors"
FILES = sorted((VECTORS / "cache" / "realisations").glob("*.doi"))
KEY = PublicKey.parse((VECTORS / "keys" / "cache.test-1.public").read_text())
HASH = Hash.of("sha256", b"").base16
ID = OutputId(HASH, "out")
FOO = "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo"
SIGNATURE = Signature("asdf", bytes(64))
ZEROS = "A" * 86 + "=="


def realisation(**changes: Any) -> bytes:
    entry = {"id": str(ID), "outPath": FOO, "signatures": [SIGNATURE.render()], "dependentRealisations": {str(ID): FOO}}
    return json.dumps(entry | changes).encode()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem[-20:])
def test_realisations_that_nix_wrote_are_read(file: Path) -> None:
    written = json.loads(file.read_bytes())
    read = parse_realisation(file.read_bytes(), OutputId.parse(file.stem))
    assert read.out_path.base_name == written["outPath"]
    assert {str(id_): path.base_name for id_, path in read.dependencies} == written["dependentRealisations"]
    assert [signature.render() for signature in read.signatures] == written.pop("signatures")
    signed = json.dumps(written, sort_keys=True, separators=(",", ":")).encode()
    assert all(KEY.verify(signed, signature) for signature in read.signatures)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem[-20:])
def test_realisations_are_written_as_nix_writes_them(file: Path) -> None:
    output = OutputId.parse(file.stem)
    read = parse_realisation(file.read_bytes(), output)
    assert render(output, read) == file.read_bytes()
    assert object_name(output) == f"realisations/{file.name}"
    assert all(KEY.verify(fingerprints(output, read)[0], signature) for signature in read.signatures)


def test_an_entry_of_the_build_trace_is_written() -> None:
    traced = TracedOutput(StorePath.parse(f"{FOO}.drv"), "out")
    written = Realisation(StorePath.parse(FOO), (SIGNATURE,))
    assert parse_build_trace(render(traced, written)) == written
    assert json.loads(render(traced, written))["signatures"] == [{"keyName": "asdf", "sig": ZEROS}]
    assert object_name(traced) == f"build-trace-v2/{FOO}.drv/out.doi"
    (text,) = fingerprints(traced, written)
    assert text.decode() == f'{{"key":{{"drvPath":"{FOO}.drv","outputName":"out"}},"value":{{"outPath":"{FOO}"}}}}'


def test_the_vectors_hold_dependencies_and_outputs() -> None:
    read = [parse_realisation(file.read_bytes(), OutputId.parse(file.stem)) for file in FILES]
    assert any(realisation.dependencies for realisation in read)
    assert {OutputId.parse(file.stem).output for file in FILES} == {"out", "dev"}


def test_an_entry_of_the_build_trace_is_read_with_both_kinds_of_signature() -> None:
    parts = {"keyName": "asdf", "sig": ZEROS}
    data = json.dumps({"outPath": FOO, "signatures": [parts, f"asdf:{ZEROS}"], "new": {"x": [1]}}).encode()
    assert parse_build_trace(data) == Realisation(StorePath.parse(FOO), (SIGNATURE, SIGNATURE))


def test_what_may_be_absent() -> None:
    bare = Realisation(StorePath.parse(FOO), ())
    assert parse_build_trace(json.dumps({"outPath": FOO}).encode()) == bare
    assert parse_realisation(json.dumps({"id": str(ID), "outPath": FOO}).encode(), ID) == bare


def test_ids_are_read_back() -> None:
    assert OutputId.parse(f"{HASH}!out") == ID
    assert str(ID) == f"{HASH}!out"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!",
        "!out",
        HASH,
        f"{HASH}!",
        f"{HASH}!a/b",
        f"{HASH}!..",
        f"{HASH}!out!x",
        f"{HASH[:-1]}!out",
        f"{Hash.of('sha256', b'').nix32}!out",
        f"{HASH.upper().replace('SHA256', 'sha256')}!out",
        f"{Hash.of('sha1', b'').base16}!out",
        f"{HASH}^out",
    ],
)
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(BadInput):
        OutputId.parse(text)


def test_names_of_the_build_trace() -> None:
    read = TracedOutput.parse(f"{FOO}.drv", "out")
    assert (read.derivation, read.output) == (StorePath.parse(f"{FOO}.drv"), "out")


@pytest.mark.parametrize(
    ("derivation", "output"), [(FOO, "out"), (f"{FOO}.drv", ""), (f"{FOO}.drv", "../x"), ("x.drv", "out")]
)
def test_what_is_no_name_of_the_build_trace(derivation: str, output: str) -> None:
    with pytest.raises(BadInput):
        TracedOutput.parse(derivation, output)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": f"{HASH}!dev"},
        {"id": 5},
        {"outPath": f"/nix/store/{FOO}"},
        {"outPath": None},
        {"signatures": ["asdf"]},
        {"signatures": "asdf"},
        {"signatures": [{"keyName": "asdf", "sig": "AAAA"}]},
        {"signatures": [{"keyName": "as:df", "sig": ZEROS}]},
        {"dependentRealisations": {"x": FOO}},
        {"dependentRealisations": {str(ID): "x"}},
        {"dependentRealisations": []},
    ],
    ids=str,
)
def test_corrupt_realisations_are_refused(changes: dict[str, Any]) -> None:
    parse_realisation(realisation(), ID)
    with pytest.raises(BadInput):
        parse_realisation(realisation(**changes), ID)


NO_JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"outPath": "\xff"}',
    b'{"outPath": "\\ud800"}',
    b'{"x": ' + b"[" * 200_000,
    b"[" * 200_000,
]


@pytest.mark.parametrize("data", NO_JSON, ids=lambda data: str(data[:20]))
def test_what_is_no_document_is_refused(data: bytes) -> None:
    for read in (parse_build_trace, debuginfo.parse, lambda data, **limit: parse_realisation(data, ID, **limit)):
        with pytest.raises(BadInput) as caught:
            read(data, limit=1 << 20)
        assert len(str(caught.value)) < 300


def test_sizes_are_limited() -> None:
    for read in (parse_build_trace, debuginfo.parse, lambda data, **limit: parse_realisation(data, ID, **limit)):
        with pytest.raises(TooLarge):
            read(realisation(), limit=len(realisation()) - 1)


@given(
    st.binary() | st.recursive(st.text() | st.none(), lambda inner: st.dictionaries(st.text(), inner)).map(json.dumps)
)
def test_any_bytes_are_a_value_or_bad_input(data: bytes | str) -> None:
    raw = data if isinstance(data, bytes) else data.encode()
    for read in (parse_build_trace, debuginfo.parse, lambda data: parse_realisation(data, ID)):
        with pytest.raises(BadInput):
            read(raw)


def test_debug_information_that_nix_wrote_is_read() -> None:
    file = next((VECTORS / "cache" / "debuginfo").iterdir())
    assert is_build_id(file.stem)
    read = debuginfo.parse(file.read_bytes())
    assert (VECTORS / "cache" / read.url).is_file()
    assert read.member == f"lib/debug/.build-id/{file.stem[:2]}/{file.stem[2:]}.debug"


@pytest.mark.parametrize("text", ["", "ab" * 19, "ab" * 21, "AB" * 20, "ab" * 19 + "a\n", "ab" * 19 + "a/"])
def test_what_is_no_build_id(text: str) -> None:
    assert not is_build_id(text)


def debug_entry(archive: str, member: str) -> bytes:
    return json.dumps({"archive": archive, "member": member}).encode()


def test_debug_information_names_a_nar_and_a_member() -> None:
    assert debuginfo.parse(debug_entry("../nar/x.nar?y", "lib/é/..x")) == DebugInfo("nar/x.nar?y", "lib/é/..x")


@pytest.mark.parametrize(
    "archive", ["", "..", "../", "nar/x", "/nar/x", "../../nar/x", "..//nar", "../nar/../x", "../a b", "../é", "../a\n"]
)
def test_archives_outside_of_the_cache_are_refused(archive: str) -> None:
    with pytest.raises(BadInput, match="URL of a NAR"):
        debuginfo.parse(debug_entry(archive, "x"))


@pytest.mark.parametrize("member", ["", "/", "/x", "x/", "x//y", ".", "..", "x/../y", "../x", "x/.", "x\0y"])
def test_members_outside_of_the_nar_are_refused(member: str) -> None:
    with pytest.raises(BadInput, match="path of a file"):
        debuginfo.parse(debug_entry("../nar/x", member))
