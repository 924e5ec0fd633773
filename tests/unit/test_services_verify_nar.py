"""What a NAR's bytes really are."""

from __future__ import annotations

import gzip
import json
import lzma
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.hashes import Hash
from cachesrv.services import verify_nar
from cachesrv.services.verify_nar import verify
from tests.samples import directory_nar, file_nar

if TYPE_CHECKING:
    from collections.abc import Callable

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}
NAR = file_nar(b"some bytes" * 1000)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_hashes_sizes_and_listing(compression: str, size: int) -> None:
    file = COMPRESSORS[compression](NAR)
    verified = verify(compression, pieces(file, size))
    assert (verified.file_hash, verified.file_size) == (Hash.of("sha256", file), len(file))
    assert (verified.nar_hash, verified.nar_size) == (Hash.of("sha256", NAR), len(NAR))
    assert verified.listing is not None
    listing = json.loads(zstandard.ZstdDecompressor().decompress(verified.listing))
    assert listing["root"] == {"type": "regular", "size": 10_000, "executable": False, "narOffset": 96}


@pytest.mark.parametrize("nar", [b"", NAR[:-1], NAR + b"\0", b"x" + NAR, directory_nar(b"b", b"a")])
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_what_is_no_canonical_nar(compression: str, nar: bytes) -> None:
    with pytest.raises(BadInput):
        verify(compression, [COMPRESSORS[compression](nar)])


def test_the_limit_is_that_of_the_contents() -> None:
    """What it is compressed to does not help; exactly as much as allowed is allowed."""
    file = COMPRESSORS["zstd"](NAR)
    assert len(file) < 1000
    assert verify("zstd", [file], nar_limit=len(NAR)).nar_size == len(NAR)
    with pytest.raises(TooLarge, match=f"more than the {len(NAR) - 1} bytes"):
        verify("zstd", [file], nar_limit=len(NAR) - 1)


def test_a_listing_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_nar, "LISTING_LIMIT", 100)
    verified = verify("none", [directory_nar(*(f"{number:04}".encode() for number in range(100)))])
    assert verified.listing is None
    assert verified.nar_size > 10_000
