"""Where two builds of one path differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.errors import BadInput
from cachesrv.nix.nar_writer import dump
from cachesrv.services.determinism import Entry, contents, differences

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.services.determinism import Contents


def tree(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tool").write_bytes(b"#!/bin/sh\n")
    (root / "bin" / "tool").chmod(0o755)
    (root / "empty").write_bytes(b"")
    (root / "same").write_bytes(b"the same")
    (root / "link").symlink_to("same")
    (root / "share" / "doc").mkdir(parents=True)
    (root / "share" / "doc" / "manual").write_bytes(b"built at 10:00")
    return root


def read(root: Path) -> Contents:
    return contents("none", dump(root))


def test_equal_trees_do_not_differ(tmp_path: Path) -> None:
    here, there = read(tree(tmp_path / "a")), read(tree(tmp_path / "b"))
    assert here == there
    assert differences(here.entries, there.entries) == []
    assert here.entries["bin/tool"].executable
    assert here.entries["empty"].size == 0
    assert here.entries["link"] == Entry("symlink", target="same")
    assert here.entries["."] == Entry("directory")


def test_all_kinds_of_differences(tmp_path: Path) -> None:
    one, other = tree(tmp_path / "a"), tree(tmp_path / "b")
    (other / "share" / "doc" / "manual").write_bytes(b"built at 10:01")
    (other / "bin" / "tool").chmod(0o644)
    (other / "link").unlink()
    (other / "link").symlink_to("empty")
    (other / "empty").unlink()
    (other / "empty").mkdir()
    (other / "empty" / "inside").write_bytes(b"")
    (one / "only").mkdir()
    (one / "only" / "inside").write_bytes(b"")
    (other / "more").write_bytes(b"12345")
    found = [str(difference) for difference in differences(read(one).entries, read(other).entries)]
    said = {line.partition(": ")[0]: line.partition(": ")[2] for line in found}
    assert list(said) == ["bin/tool", "empty", "link", "more", "only", "share/doc/manual"]
    assert said["bin/tool"].count("10 bytes") == 2
    assert said["bin/tool"].partition(";")[0].endswith("executable")
    assert not said["bin/tool"].endswith("executable")
    assert said["empty"].endswith("there a directory")
    assert said["link"] == "here a link to same; there a link to empty"
    assert said["more"].startswith("only there, 5 bytes, sha256 5994471a")
    assert said["only"] == "only here, a directory"


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    (difference,) = differences(read(tmp_path / "a").entries, read(tmp_path / "b").entries)
    assert difference.name == "."


def test_it_is_read_through_its_compression(tmp_path: Path) -> None:
    nar = b"".join(dump(tree(tmp_path / "a")))
    packed = zstandard.ZstdCompressor().compress(nar)
    assert contents("zstd", iter([packed])) == contents("none", iter([nar]))
    with pytest.raises(BadInput):
        contents("zstd", iter([packed[:-1]]))
