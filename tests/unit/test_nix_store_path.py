"""Store paths: the rules of their names and how they are computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import BadInput
from cachesrv.nix.hashes import Hash
from cachesrv.nix.store_path import (
    DEFAULT_STORE_DIR,
    HASH_PART_LENGTH,
    StorePath,
    check_store_dir,
    is_hash_part,
    is_name,
    make_store_path,
)
from tests.strategies import hash_parts, names, store_dirs, store_paths

HASH_PART = "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0"


def test_a_base_name_is_read() -> None:
    path = StorePath.parse(f"{HASH_PART}-foo-1.0.drv")
    assert (path.hash_part, path.name) == (HASH_PART, "foo-1.0.drv")
    assert path.base_name == str(path) == f"{HASH_PART}-foo-1.0.drv"
    assert path.full(DEFAULT_STORE_DIR) == f"/nix/store/{HASH_PART}-foo-1.0.drv"
    assert path.is_derivation
    assert not StorePath(HASH_PART, "drv").is_derivation


@given(store_paths, store_dirs)
def test_paths_are_read_back(path: StorePath, store_dir: str) -> None:
    assert StorePath.parse(path.base_name) == path
    assert StorePath.parse_full(path.full(store_dir), store_dir) == path


@given(st.lists(store_paths, max_size=5), names)
def test_paths_are_ordered_as_their_base_names(paths: list[StorePath], name: str) -> None:
    paths += [StorePath(path.hash_part, name) for path in paths]
    assert [path.base_name for path in sorted(paths)] == sorted(path.base_name for path in paths)


@given(st.text() | st.builds("{}-{}".format, hash_parts, st.text()) | st.builds("{}{}".format, hash_parts, names))
def test_any_text_is_a_path_or_bad_input(text: str) -> None:
    try:
        path = StorePath.parse(text)
    except BadInput:
        return
    assert path.base_name == text


@pytest.mark.parametrize("name", ["a", "-", "=", "+?", "...", ".a", "..a", ".a-", "a" * 211, "-.", "._-"])
def test_names_that_nix_takes(name: str) -> None:
    assert is_name(name)
    assert StorePath.parse(f"{HASH_PART}-{name}").name == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".-", ".-a", "..-", "..-a", "a" * 212, "a b", "a/b", "é", "a\n", "\n", "a\0", "\ud800", "a~"],
)
def test_names_that_nix_refuses(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(BadInput):
        StorePath.parse(f"{HASH_PART}-{name}")
    with pytest.raises(BadInput):
        make_store_path("source", Hash.of("sha256", b""), name, DEFAULT_STORE_DIR)


@pytest.mark.parametrize(
    "text",
    ["", HASH_PART[1:], HASH_PART + "0", HASH_PART[:-1] + "e", HASH_PART[:-1] + "\n", HASH_PART.upper(), "٣" * 32],
)
def test_what_is_no_hash_part(text: str) -> None:
    assert not is_hash_part(text)
    with pytest.raises(BadInput):
        StorePath(text, "name")


@given(hash_parts)
def test_hash_parts_are_known(text: str) -> None:
    assert len(text) == HASH_PART_LENGTH
    assert is_hash_part(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/nix/store",
        f"/nix/store/{HASH_PART}",
        f"/nix/store//{HASH_PART}-a",
        f"/nix/store/x/{HASH_PART}-a",
        f"/nix/store/{HASH_PART}-a/b",
        f"/nix/stores/{HASH_PART}-a",
        f"nix/store/{HASH_PART}-a",
        f"{HASH_PART}-a",
    ],
)
def test_full_paths_lie_directly_in_the_store_directory(text: str) -> None:
    with pytest.raises(BadInput):
        StorePath.parse_full(text, DEFAULT_STORE_DIR)


@pytest.mark.parametrize("store_dir", ["/nix/store", "/s", "/with blank/~x", "/..a/.b/..."])
def test_store_directories(store_dir: str) -> None:
    assert check_store_dir(store_dir) == store_dir


@pytest.mark.parametrize("store_dir", ["", "/", "nix/store", "/nix/store/", "//nix", "/a/../b", "/a/.", "/é", "/a\nb"])
def test_what_is_no_store_directory(store_dir: str) -> None:
    with pytest.raises(BadInput, match="store directory"):
        check_store_dir(store_dir)


def test_the_store_directory_is_part_of_the_digest() -> None:
    inner = Hash.of("sha256", b"bar")
    assert make_store_path("text", inner, "foo", DEFAULT_STORE_DIR) == StorePath(HASH_PART, "foo")
    assert make_store_path("text", inner, "foo", "/other/store") != StorePath(HASH_PART, "foo")
    with pytest.raises(BadInput):
        make_store_path("text", inner, "foo", "relative")
