"""`cachesrv pushed`, and what `ls`, `cat` and programs read from the record of what was pushed."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cachesrv.cli import run
from cachesrv.errors import NotFound, StoreError
from cachesrv.nix.hashes import Hash
from cachesrv.nix.listing import Directory, Regular, Symlink
from cachesrv.nix.nar_writer import dump
from cachesrv.push.inspection import Inspection, Seen
from cachesrv.push.pushed import open_pushed, read_file
from cachesrv.push.record import PushedPath, Reads, Record, SeenNar
from tests.push_doubles import store_path

PRODUCTS = "nix-support/hydra-build-products"
CACHE = "http://127.0.0.1:9/main"
"""Where nobody answers."""


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """No settings, a record, and a store in which nothing is but what tests put there."""
    for name in ("CACHESRV_TOKEN", "NETRC", "XDG_CONFIG_HOME", "NIX_USER_CONF_FILES", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    values = {
        "HOME": str(tmp_path),
        "NIX_CONF_DIR": str(tmp_path),
        "NIX_REMOTE": str(tmp_path / "root"),
        "CACHESRV_PUSHED": str(tmp_path / "pushed.sqlite"),
        "CACHESRV_URL": CACHE,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def path(tmp_path: Path, environ: dict[str, str]) -> str:
    """A path that was pushed and is in no store any more."""
    tree = tmp_path / "tree"
    (tree / "nix-support").mkdir(parents=True)
    (tree / PRODUCTS).write_text("file x $out/file\n")
    (tree / "file").write_text("not kept")
    (tree / "alias").symlink_to(PRODUCTS)
    (tree / "elsewhere").symlink_to("/nix/store/elsewhere")
    put_on_record(environ, tree, "release")
    return store_path("release").full("/nix/store")


def put_on_record(environ: dict[str, str], tree: Path, name: str) -> None:
    found: list[Seen] = []
    looking = Inspection(found.append)
    nar = b"".join(dump(tree))
    looking.feed(memoryview(nar))
    looking.accept()
    nar_hash = Hash.of("sha256", nar)
    full = store_path(name).full("/nix/store")
    with closing(Record.open(Path(environ["CACHESRV_PUSHED"]))) as record:
        record.write(
            [SeenNar.of(nar_hash, found[0])], [PushedPath(full, CACHE, nar_hash.nix32, len(nar), 1_700_000_000)]
        )


def in_store(tmp_path: Path, path: str) -> Path:
    """Its place in the store here."""
    return tmp_path / "root" / path.removeprefix("/")


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0
    return capsys.readouterr().out


def test_ls_and_listings_come_from_the_record(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "ls", path) == "alias\nelsewhere\nfile\nnix-support\n"
    assert out_of(capsys, "ls", "-lR", path, "nix-support").split()[1:] == ["17", "hydra-build-products"]
    assert run(["ls", f"{path}/none"]) == 1
    assert f"there is no none in {path}" in capsys.readouterr().err


async def test_files_come_from_the_record(path: str, environ: dict[str, str]) -> None:
    assert await read_file(f"{path}/{PRODUCTS}", environ) == b"file x $out/file\n"
    assert await read_file(f"{path}/alias", environ) == b"file x $out/file\n"
    with pytest.raises(NotFound, match="there is no none"):
        await read_file(f"{path}/none", environ)
    with pytest.raises(NotFound, match="is a link to /nix/store/elsewhere"):
        await read_file(f"{path}/elsewhere", environ)
    with open_pushed(environ) as pushed:
        assert pushed.reads() == {"record": Reads(2, 34)}


async def test_what_is_not_on_record_comes_from_the_store(path: str, environ: dict[str, str], tmp_path: Path) -> None:
    real = in_store(tmp_path, path)
    real.mkdir(parents=True)
    (real / "file").write_text("here")
    (real / "elsewhere").symlink_to("../other/file")
    (real / "absolute").symlink_to("/nix/store/other/../other/./file")
    (real.parent / "other").mkdir()
    (real.parent / "other/file").write_text("behind a link")

    assert await read_file(f"{path}/file", environ) == b"here"
    assert await read_file(f"{path}/elsewhere", environ) == b"behind a link"
    assert await read_file(f"{path}/absolute", environ) == b"behind a link"
    with open_pushed(environ) as pushed:
        assert pushed.reads() == {"store": Reads(3, 30)}


async def test_links_that_lead_in_circles_are_told(path: str, environ: dict[str, str], tmp_path: Path) -> None:
    real = in_store(tmp_path, path)
    real.mkdir(parents=True)
    (real / "circle").symlink_to("./circle")

    with pytest.raises(StoreError, match="circle cannot be read: Too many levels of symbolic links"):
        await read_file(f"{path}/circle", environ)


@pytest.mark.parametrize("member", ["file", "folder/secret", "../../secret", "folder/.."])
def test_what_leads_out_of_the_store_is_not_read(
    member: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], environ: dict[str, str]
) -> None:
    """What was built may have links to whatever it likes."""
    base = str(store_path("unknown"))
    outside = tmp_path / "root/nix"
    real = in_store(tmp_path, f"/nix/store/{base}")
    real.mkdir(parents=True)
    (real / "file").symlink_to(outside / "secret")
    (real / "folder").symlink_to(outside)
    (outside / "secret").write_text("told")

    for full in (base, f"/nix/store/{base}"):
        assert run(["cat", f"{full}/{member}"]) == 1
    assert run(["ls", f"{base}/{member}"]) == (0 if member == "file" else 1)
    out, err = capfd.readouterr()
    assert "told" not in out
    assert f"leads out of the store, to {tmp_path}/root" in err
    with pytest.raises(NotFound):
        asyncio.run(read_file(f"{base}/{member}", environ))


def test_a_cache_that_is_named_is_asked(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cat", "--from", CACHE, f"{path}/{PRODUCTS}"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_programs_ask_for_outputs(path: str, environ: dict[str, str]) -> None:
    with open_pushed(environ) as pushed:
        found = pushed.find(path)
        assert found is not None
        products = found.file(PRODUCTS)
        assert products is not None
        assert (products.kind, products.size, products.content) == ("regular", 17, b"file x $out/file\n")
        assert isinstance(found.listing, Directory)
        assert isinstance(found.listing.entries["file"], Regular)
        assert isinstance(found.listing.entries["alias"], Symlink)
        assert pushed.find("/nix/store/none") is None
        assert [push.path for push in pushed.paths()] == [path]


@pytest.mark.parametrize("trouble", ["absent", "not allowed"])
def test_without_a_record_there_is_no_news(environ: dict[str, str], tmp_path: Path, trouble: str) -> None:
    if trouble == "not allowed":
        Path(environ["CACHESRV_PUSHED"]).mkdir()
    with open_pushed(environ) as pushed:
        assert pushed.find("/nix/store/none") is None
        assert (list(pushed.paths()), dict(pushed.reads())) == ([], {})
        pushed.count("store", 1)


def test_pushed_lists_pushes(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "pushed") == f"2023-11-14 22:13:20Z  {path}  {CACHE}\n"
    of_one = out_of(capsys, "pushed", path)
    assert f"{PRODUCTS}  17 bytes, sha256 " in of_one
    document: dict[str, Any] = json.loads(out_of(capsys, "pushed", "--json"))
    assert document["path"] == path
    assert document["pushes"] == [{"cache": CACHE, "at": 1_700_000_000}]
    assert document["files"][0]["name"] == PRODUCTS
    assert run(["pushed", store_path("other").full("/nix/store")]) == 1
    assert "was not pushed from here" in capsys.readouterr().err


def test_pushed_claims_nothing_of_what_did_not_go_by(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    full = store_path("twin").full("/nix/store")
    with closing(Record.open(Path(environ["CACHESRV_PUSHED"]))) as record:
        record.write([], [PushedPath(full, CACHE, Hash.of("sha256", b"").nix32, 120, 1_700_000_000)])

    assert out_of(capsys, "pushed", full) == f"2023-11-14 22:13:20Z  {full}  {CACHE}\n"
    document: dict[str, Any] = json.loads(out_of(capsys, "pushed", "--json"))
    assert (document["nar_size"], document["files"]) == (120, None)


def test_names_of_any_kind_leave_the_terminal_alone(
    environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    (tree / "nix-support").mkdir(parents=True)
    (tree / "nix-support/\x1b[2J\nodd").write_text("x")
    put_on_record(environ, tree, "odd")

    _, row = out_of(capsys, "pushed", store_path("odd").full("/nix/store")).splitlines()
    assert row.startswith("  nix-support/ [2J odd  1 bytes, ")


def test_pushed_tells_what_was_spared(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    out_of(capsys, "ls", path)
    out_of(capsys, "ls", path)

    assert "       2 downloads avoided" in out_of(capsys, "pushed", "--reads")
    assert json.loads(out_of(capsys, "pushed", "--reads", "--json"))["record"] == {"count": 2, "bytes": 0}
