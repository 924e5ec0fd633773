"""Packs on the wire: what was packed comes out, and nothing else does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.api import PackedNar, PackHead, PackLimits, PathToPublish
from cachesrv.errors import BadInput, TooLarge
from cachesrv.pack import LIMITS, decode, encode, largest

FILES = st.lists(st.binary(max_size=100), max_size=10)
NAMES = st.text(max_size=20)
PATHS = st.builds(PathToPublish, NAMES, NAMES, st.integers(0, 2**63 - 1), st.lists(NAMES, max_size=3))


def packed(*files: bytes, paths: list[PathToPublish] | None = None) -> bytes:
    nars = [PackedNar(f"sha256:{number}", 1, len(file)) for number, file in enumerate(files)]
    return encode(PackHead(nars, paths or []), files)


@given(FILES, st.lists(PATHS, max_size=3))
def test_round_trip(files: list[bytes], paths: list[PathToPublish]) -> None:
    pack = decode(packed(*files, paths=paths), LIMITS)

    assert [bytes(file) for file in pack.files] == files
    assert [nar.nar_hash for nar in pack.head.nars] == [f"sha256:{number}" for number in range(len(files))]
    assert pack.head.paths == paths


@given(FILES, st.data())
def test_one_that_was_cut_or_goes_on_is_refused(files: list[bytes], data: st.DataObject) -> None:
    body = packed(*files)
    cut = body[: data.draw(st.integers(0, len(body) - 1))]

    for other in (cut, body + b"\0"):
        with pytest.raises(BadInput):
            decode(other, LIMITS)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_give_a_pack_or_bad_input(noise: bytes, position: int) -> None:
    body = packed(b"one", b"two")
    for bad in (noise, len(noise).to_bytes(4, "little") + noise, body[:position] + noise + body[position:]):
        try:
            pack = decode(bad, LIMITS)
        except BadInput:
            continue
        assert len(pack.files) == len(pack.head.nars)


@pytest.mark.parametrize(
    "head",
    [
        b'{"nars":[["sha256:x",1,-1],["sha256:y",1,1]]}',
        b'{"nars":[["sha256:x",-1,0]]}',
        b'{"nars":[["sha256:x",1,99999999999999999999999]]}',
        b'{"nars":[["sha256:x",1,1e3]]}',
        b'{"nars":[["sha256:x"]]}',
        b'{"paths":[]}',
        b"[" * 100_000,
        b'{"nars":[["\xff",1,0]]}',
    ],
)
def test_heads_that_make_no_sense(head: bytes) -> None:
    with pytest.raises(BadInput):
        decode(len(head).to_bytes(4, "little") + head, LIMITS)


def test_limits() -> None:
    limits = PackLimits(nars=2, size=10, nar_size=5, head_size=100)
    body = packed(b"one", b"two")

    assert len(decode(body, limits).files) == 2
    with pytest.raises(TooLarge, match="3 NARs in one pack, at most 2"):
        decode(packed(b"", b"", b""), limits)
    with pytest.raises(TooLarge, match="at most 10 are taken"):
        decode(body, msgspec.structs.replace(limits, head_size=10))
    assert largest(limits) == 114


def test_files_are_not_copied() -> None:
    body = packed(b"one")

    assert decode(body, LIMITS).files[0].obj is body


def test_fields_may_be_added() -> None:
    head = b'{"later":1,"nars":[["sha256:x",1,3,"later"]]}'

    assert [*decode(len(head).to_bytes(4, "little") + head + b"one", LIMITS).files] == [b"one"]
