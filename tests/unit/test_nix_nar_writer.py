"""NARs of trees on disk, compared with `nix-store --dump` and given to `nix-store --restore`."""

import errno
import gc
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, NotFound, StoreError
from cachesrv.nix import listing
from cachesrv.nix.nar import NarReader
from cachesrv.nix.nar_writer import dump, nar_size

# On disk: contents with the mode's execute bits, a link's target, or entries by name.
Tree = tuple[bytes, int] | bytes | dict[bytes, "Tree"]

names = st.one_of(
    st.binary(min_size=1, max_size=12).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"0")),
    st.sampled_from([b"n" * 255, "größe".encode(), b" ", b"-rf", b"\xff", b"A", b"a"]),
).filter(lambda name: name not in (b".", b".."))
leaves = st.one_of(
    st.tuples(st.binary(max_size=80), st.sampled_from((0, 0o100, 0o011, 0o111))),
    st.sampled_from([b"target", b"../..", b"/nix/store", b"\xfe", b"t" * 4095]),
)
trees = st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=10)


def plant(tree: Tree, path: Path) -> None:
    match tree:
        case bytes():
            path.symlink_to(os.fsdecode(tree))
        case (contents, execute):
            path.write_bytes(contents)
            path.chmod(0o644 | execute)
        case _:
            path.mkdir()
            for name, node in tree.items():
                plant(node, path / os.fsdecode(name))


def nix_dump(path: Path) -> bytes:
    return subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True).stdout


def whole(path: Path | str) -> bytes:
    return b"".join(dump(path))


@given(trees, st.sampled_from((1, 16, 100, 256 * 1024)))
@settings(max_examples=25, deadline=None)
def test_any_tree_as_nix_dumps_it(tree: Tree, chunk_size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tree"
        plant(tree, path)
        nar = b"".join(dump(path, chunk_size=chunk_size))
        assert nar == nix_dump(path)
        assert nar_size(path) == len(nar)
        reader = NarReader()
        reader.feed(nar)
        reader.finish()


@given(trees)
@settings(max_examples=10, deadline=None)
def test_nix_restores_what_was_dumped(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as name:
        original, copy = Path(name) / "tree", Path(name) / "copy"
        plant(tree, original)
        nar = whole(original)
        subprocess.run(["nix-store", "--restore", copy], input=nar, check=True)
        assert whole(copy) == nar


@pytest.fixture(scope="module")
def big() -> Iterator[Path]:
    """A thousand files of many sizes, one of 5 MB, and some of everything else."""
    chance = random.Random(7)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number in range(1000):
            path = root / f"d{number % 37}" / f"f{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(chance.randbytes(chance.choice((0, 1, 7, 8, 100, 1024, 5000))))
        (root / "d0" / "large").write_bytes(chance.randbytes(5_000_001))
        (root / "d0" / "run").write_bytes(b"#!/bin/sh\n")
        (root / "d0" / "run").chmod(0o755)
        (root / "d1" / "link").symlink_to("../d0/large")
        (root / "empty").mkdir()
        yield root


def test_a_big_tree_and_its_listing(big: Path, tmp_path: Path) -> None:
    nar = tmp_path / "big.nar"
    reader = NarReader()
    with nar.open("wb") as file:
        for chunk in dump(big):
            file.write(chunk)
            reader.feed(chunk)
    reader.finish()
    assert nar.read_bytes() == nix_dump(big)
    assert nar_size(big) == reader.size
    command = ["nix", "--extra-experimental-features", "nix-command", "nar", "ls", "--json", "-R", str(nar), "/"]
    listed = subprocess.run(command, check=True, capture_output=True).stdout
    assert reader.root == listing.parse(b'{"version":1,"root":%s}' % listed)
    assert reader.root is not None
    large = listing.find(reader.root, "d0/large")
    assert isinstance(large, listing.Regular)
    with nar.open("rb") as file:
        file.seek(large.nar_offset)
        assert file.read(large.size) == (big / "d0" / "large").read_bytes()
    assert json.loads(listing.render(reader.root))["root"]["entries"]["empty"]["entries"] == {}


def test_chunks_are_large_and_stay_as_they_were(big: Path) -> None:
    chunks = list(dump(big, chunk_size=65536))
    assert b"".join(chunks) == nix_dump(big)
    sizes = [len(chunk) for chunk in chunks]
    assert {*sizes[:-1]} == {65536}
    assert 0 < sizes[-1] <= 65536


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    size = sum(map(len, dump(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == nar_size(path) > 100_000_000
    assert peak < 2_000_000


def test_only_the_owner_s_bit_makes_a_file_executable(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for mode, executable in ((0o100, True), (0o744, True), (0o611, False), (0o644, False)):
        plant((b"x", 0), path)
        path.chmod(mode)
        assert (b"executable" in whole(path)) is executable


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    plant({b"link": b"file", b"file": (b"x", 0), b"dir": {}, b"to-dir": b"dir"}, tmp_path / "t")
    for name, target in (("link", b"file"), ("to-dir", b"dir"), ("to-dir/", b"dir")):
        nar = whole(f"{tmp_path}/t/{name}")
        assert b"symlink" in nar
        assert target in nar


def test_paths_of_every_type(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello\n")
    nar = nix_dump(tmp_path / "f")
    for path in (tmp_path / "f", str(tmp_path / "f"), bytes(tmp_path / "f")):
        assert b"".join(dump(path)) == nar
        assert nar_size(path) == len(nar) == 120


def refuses(path: Path | str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        whole(path)
    with pytest.raises(error, match=message):
        nar_size(path)


def test_what_no_nar_can_hold(tmp_path: Path) -> None:
    pipe, listener = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(listener))
    for special in (pipe, listener, Path("/dev/null")):
        refuses(special, BadInput, "neither file, directory nor symbolic link")
    refuses(tmp_path, BadInput, "pipe' is neither")
    pipe.unlink()
    refuses(tmp_path, BadInput, "socket' is neither")


def test_64_levels_are_dumped_and_65_are_not(tmp_path: Path) -> None:
    deepest = tmp_path.joinpath(*["d"] * 63)
    deepest.mkdir(parents=True)
    assert whole(tmp_path) == nix_dump(tmp_path)
    (deepest / "d").mkdir()
    refuses(tmp_path, BadInput, "deeper than 64 levels")


def test_nothing_there(tmp_path: Path) -> None:
    refuses(tmp_path / "none", NotFound, r"nothing is at '.*/none'")
    refuses(tmp_path / "none" / "below", NotFound, "below")
    refuses("", NotFound, "nothing is at ''")
    refuses("a\0b", BadInput, "no path")
    plant((b"x", 0), tmp_path / "file")
    refuses(tmp_path / "file" / "below", BadInput, r"cannot read '.*/file/below': Not a directory")


@pytest.mark.parametrize("size", [0, 99_999, 100_001, 300_000])
def test_a_file_that_changes_its_size(tmp_path: Path, size: int) -> None:
    plant({b"a": (bytes(100_000), 0), b"b": (b"", 0)}, tmp_path / "t")
    chunks = dump(tmp_path / "t", chunk_size=10_000)
    next(chunks)
    os.truncate(tmp_path / "t" / "a", size)
    with pytest.raises(BadInput, match="t/a' changed while it was read"):
        list(chunks)


@pytest.mark.parametrize("swap", ["link", "directory", "gone", "pipe"])
def test_an_entry_that_becomes_something_else(tmp_path: Path, swap: str) -> None:
    """The directory has been listed and the first file is being read when the next one is replaced."""
    plant({b"a": (bytes(1000), 0), b"b": (b"secret", 0), b"c": {b"d": (b"", 0)}}, tmp_path / "t")
    chunks = dump(tmp_path / "t", chunk_size=100)
    next(chunks)
    target = tmp_path / "t" / "b"
    target.rename(tmp_path / "secret")
    if swap == "link":
        target.symlink_to("../secret")
    elif swap == "directory":
        target.mkdir()
    elif swap == "pipe":
        os.mkfifo(target)
    with pytest.raises(BadInput, match=r"/t/b' changed|cannot read '.*/t/b'"):
        list(chunks)


def test_a_directory_that_becomes_a_link(tmp_path: Path) -> None:
    plant({b"a": (bytes(1000), 0), b"c": {b"d": (b"", 0)}}, tmp_path / "t")
    chunks = dump(tmp_path / "t", chunk_size=100)
    next(chunks)
    directory = tmp_path / "t" / "c"
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to("../elsewhere")
    with pytest.raises(BadInput, match=r"cannot read '.*/t/c'"):
        list(chunks)


def test_a_disk_that_fails_is_not_the_input_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant((b"x", 0), tmp_path / "f")

    def fails(descriptor: int, buffers: list[memoryview]) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "readv", fails)
    with pytest.raises(StoreError, match=r"cannot read '.*/f': Input/output error"):
        whole(tmp_path / "f")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_are_closed_however_it_ends(tmp_path: Path) -> None:
    plant({b"d": {b"e": {b"f": (bytes(10_000), 0)}}, b"z": (b"", 0)}, tmp_path / "t")
    gc.collect()
    before = open_files()
    chunks = dump(tmp_path / "t", chunk_size=4000)
    next(chunks)
    assert open_files() == before + 4  # three directories and the file
    chunks.close()
    assert open_files() == before
    chunks = dump(tmp_path / "t", chunk_size=4000)
    next(chunks)
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(BadInput):
        list(chunks)
    assert open_files() == before
