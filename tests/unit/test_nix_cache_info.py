"""`nix-cache-info`."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.cache_info import CacheInfo, parse, render
from tests.strategies import store_dirs

VECTOR = Path(__file__).parents[1] / "vectors" / "cache" / "nix-cache-info"


def test_what_nix_writes_is_read() -> None:
    assert parse(VECTOR.read_bytes()) == CacheInfo("/nix/store")


def test_it_is_written_in_full() -> None:
    info = CacheInfo("/nix/store", want_mass_query=True, priority=41)
    assert render(info) == b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 41\n"


@given(st.builds(CacheInfo, st.none() | store_dirs, st.booleans(), st.integers(-(2**31) + 1, 2**31 - 1)))
def test_it_is_read_back(info: CacheInfo) -> None:
    assert parse(render(info)) == info


@given(st.binary() | st.lists(st.sampled_from(("StoreDir", "Priority", ":", " ", "\n", "/s", "-7"))))
def test_any_bytes_are_an_info_or_bad_input(data: bytes | list[str]) -> None:
    try:
        info = parse(data if isinstance(data, bytes) else "".join(data).encode())
    except BadInput:
        return
    assert parse(render(info)) == info


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", CacheInfo()),
        ("StoreDir:/s", CacheInfo("/s")),
        ("StoreDir: \t/s \r\n", CacheInfo("/s")),
        ("StoreDir", CacheInfo()),
        ("StoreDir: /s\nStoreDir: /t\n", CacheInfo("/t")),
        ("Odd: \xff\n\n no\nWantMassQuery: 1", CacheInfo(want_mass_query=True)),
        ("WantMassQuery: true", CacheInfo()),
        ("WantMassQuery: 11", CacheInfo()),
        ("Priority: -3", CacheInfo(priority=-3)),
        ("Priority: +30 or so", CacheInfo(priority=30)),
    ],
)
def test_it_is_read_as_nix_does(text: str, expected: CacheInfo) -> None:
    assert parse(text.encode("latin-1")) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Priority: ",
        "Priority: high",
        "Priority: 2147483648",
        "Priority: 99999999999",
        "StoreDir: ",
        "StoreDir: nix/store",
    ],
)
def test_what_no_client_can_use_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse(text.encode())


def test_size_is_limited() -> None:
    assert parse(b"x" * (1 << 16)) == CacheInfo()
    with pytest.raises(TooLarge):
        parse(b"x" * ((1 << 16) + 1))
    with pytest.raises(TooLarge):
        parse(b"xx", limit=1)
