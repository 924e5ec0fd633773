"""What `--store` and the environment mean, and which store path a file belongs to."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, ConfigError, NotFound
from cachesrv.nix.store_path import StorePath
from cachesrv.push import store_location
from cachesrv.push.store_location import Access, StoreLocation, locate

HELLO = StorePath("1" * 32, "hello")
WORLD = StorePath("2" * 32, "world")

DEFAULT = StoreLocation(
    access=Access.AUTO,
    store_dir="/nix/store",
    real_store_dir="/nix/store",
    state_dir=Path("/nix/var/nix"),
    socket=Path("/nix/var/nix/daemon-socket/socket"),
)
ROOT = StoreLocation(
    access=Access.DATABASE,
    store_dir="/nix/store",
    real_store_dir="/r/nix/store",
    state_dir=Path("/r/nix/var/nix"),
    socket=Path("/r/nix/var/nix/daemon-socket/socket"),
)
MOVED = {"NIX_STORE_DIR": "/s/store", "NIX_STATE_DIR": "/s/var", "NIX_DAEMON_SOCKET_PATH": "/run/nix.sock"}


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)


@pytest.mark.parametrize("store", [None, "", "auto"])
def test_without_a_word_the_default_store(store: str | None) -> None:
    assert locate(store, {}) == DEFAULT


@pytest.mark.parametrize(
    ("store", "access"), [("daemon", Access.DAEMON), ("unix://", Access.DAEMON), ("local", Access.DATABASE)]
)
def test_how_to_read_the_default_store(store: str, access: Access) -> None:
    located = locate(store, {})
    assert located.access is access
    assert (located.store_dir, located.state_dir, located.socket) == ("/nix/store", DEFAULT.state_dir, DEFAULT.socket)


@pytest.mark.parametrize(
    "store", ["/r", "/r/", "/r//./", "local?root=/r", "local://?root=/r", "local:///r", "/x?root=/r"]
)
def test_chroot_stores(store: str) -> None:
    assert Path(locate(store, {}).real_store_dir) == Path(ROOT.real_store_dir)
    assert locate(store, {}).access is Access.DATABASE
    assert Path(os.path.normpath(locate(store, {}).state_dir)) == ROOT.state_dir


def test_a_chroot_store_is_said_in_full() -> None:
    assert locate("/r", {}) == ROOT


def test_a_chroot_store_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("./r", {}).real_store_dir == f"{tmp_path}/r/nix/store"
    assert locate("x/r", {}).state_dir == tmp_path / "x/r/nix/var/nix"


def test_parameters_win() -> None:
    located = locate("local?root=/r&store=/s%20x/store&state=/elsewhere/var&real=/mnt&trusted=1", {})
    assert located.store_dir == "/s x/store"
    assert located.real_store_dir == "/mnt"
    assert located.state_dir == Path("/elsewhere/var")


def test_the_environment_moves_everything() -> None:
    located = locate(None, MOVED)
    assert located.store_dir == located.real_store_dir == "/s/store"
    assert located.state_dir == Path("/s/var")
    assert located.socket == Path("/run/nix.sock")
    assert locate(None, {"NIX_STATE_DIR": "/s/var"}).socket == Path("/s/var/daemon-socket/socket")
    assert locate(None, {"NIX_STORE": "/old/store"}).store_dir == "/old/store"
    assert locate(None, dict.fromkeys(MOVED, "")) == DEFAULT


@pytest.mark.parametrize(
    ("remote", "store", "expected"),
    [
        ("daemon", None, Access.DAEMON),
        ("local", None, Access.DATABASE),
        ("/r", None, Access.DATABASE),
        ("daemon", "local", Access.DATABASE),
        ("local", "auto", Access.AUTO),
    ],
)
def test_nix_remote_is_asked_only_where_nothing_is_said(remote: str, store: str | None, expected: Access) -> None:
    assert locate(store, {"NIX_REMOTE": remote}).access is expected


def test_a_socket_may_be_named() -> None:
    located = locate("unix:///run/my%20nix/socket?root=/r", MOVED)
    assert located.socket == Path("/run/my nix/socket")
    assert located.real_store_dir == "/r/nix/store"
    assert located.store_dir == "/s/store"


@pytest.mark.parametrize(
    "store", ["ssh://host", "ssh-ng://host", "https://cache", "s3://bucket", "file:///x", "dummy://", "word", "/r\0"]
)
def test_other_stores_are_refused(store: str) -> None:
    with pytest.raises(ConfigError, match="is not a store"):
        locate(store, {})


@pytest.mark.parametrize("store", ["local?store=relative", "local?store=/a/../..", "local?store=/"])
def test_a_store_directory_must_be_one(store: str) -> None:
    with pytest.raises(BadInput, match="store directory"):
        locate(store, {})


@given(st.text(max_size=30))
@example("unix://%00")
@example("local?root=%00")
@settings(max_examples=100)
def test_any_text_is_a_store_or_clearly_none(store: str) -> None:
    with suppress(BadInput, ConfigError):
        assert locate(store, {}).store_dir == "/nix/store" or "store=" in store


# A user without root, where there is no /nix


@pytest.fixture
def _no_nix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(store_location, "DEFAULT_STATE_DIR", f"{tmp_path}/no/nix")


@pytest.mark.usefixtures("_no_nix")
@pytest.mark.parametrize("variable", ["HOME", "XDG_DATA_HOME"])
def test_the_store_in_the_home_directory(tmp_path: Path, variable: str) -> None:
    environment = {variable: str(tmp_path)}
    root = tmp_path / (".local/share/nix/root" if variable == "HOME" else "nix/root")
    assert locate(None, environment).access is Access.AUTO
    root.mkdir(parents=True)
    located = locate(None, environment)
    assert located.access is Access.DATABASE
    assert located.real_store_dir == f"{root}/nix/store"
    assert located.store_dir == "/nix/store"
    others = [
        ("daemon", environment),
        ("auto?trusted=1", environment),
        (None, environment | {"NIX_STATE_DIR": "/s"}),
        (None, environment | {"NIX_STORE_DIR": "/s/store"}),
    ]
    for store, other in others:
        assert locate(store, other).real_store_dir != located.real_store_dir


# Files and their store paths


@pytest.fixture
def chroot(tmp_path: Path) -> StoreLocation:
    """A chroot store with two paths: a directory, and a link to it."""
    location = locate(f"{tmp_path}/root", {})
    hello = Path(HELLO.full(location.real_store_dir))
    (hello / "bin").mkdir(parents=True)
    (hello / "bin/hello").write_text("#!/bin/sh\n")
    Path(WORLD.full(location.real_store_dir)).symlink_to(HELLO.full("/nix/store"))
    return location


@pytest.mark.parametrize("name", ["", "/", "/bin", "/bin/hello", "//bin/./hello", "/not/there", "/bin/../bin", "/."])
@pytest.mark.parametrize("real", [False, True])
def test_a_store_path_and_what_is_in_it(chroot: StoreLocation, name: str, real: bool) -> None:
    assert chroot.resolve(HELLO.full(chroot.real_store_dir if real else "/nix/store") + name) == HELLO


def test_a_link_that_is_a_store_path_is_not_followed(chroot: StoreLocation) -> None:
    assert chroot.resolve(WORLD.full(chroot.real_store_dir)) == WORLD
    assert chroot.resolve(WORLD.full("/nix/store") + "/bin/hello") == WORLD


def test_links_into_the_store(chroot: StoreLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "result").symlink_to(HELLO.full("/nix/store"))
    (tmp_path / "real").symlink_to(HELLO.full(chroot.real_store_dir))
    (tmp_path / "chain").symlink_to("./folder/../result")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/up").symlink_to("../chain")
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "to-store").symlink_to(chroot.real_store_dir)
    monkeypatch.chdir(tmp_path / "folder")
    names = ("up", "./up/", "up/bin/hello", "../result", "../real/bin", "../here/here/chain", f"../to-store/{HELLO}")
    for name in names:
        assert chroot.resolve(name) == HELLO
    assert chroot.resolve(f"../to-store/{WORLD}") == WORLD


def test_dots_behind_a_link_are_of_where_it_leads(chroot: StoreLocation, tmp_path: Path) -> None:
    (tmp_path / "real").symlink_to(Path(chroot.real_store_dir).parent)
    assert chroot.resolve(f"{tmp_path}/real/../nix/store/{HELLO}") == HELLO


def test_a_store_behind_a_link(chroot: StoreLocation, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(tmp_path / "root")
    location = locate(f"{tmp_path}/elsewhere", {})
    assert location.real_store_dir == chroot.real_store_dir
    assert location.resolve(f"{tmp_path}/elsewhere/nix/store/{HELLO}/bin") == HELLO
    assert location.resolve(f"{tmp_path}/root/nix/store/{HELLO}/bin") == HELLO


def test_files_that_are_not_there(chroot: StoreLocation, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    for name in ("none", "dangling", "file/x"):
        with pytest.raises(NotFound, match=rf"^'{tmp_path}/{name}' leads nowhere: there is no {tmp_path}/"):
            chroot.resolve(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["file", "", "root/nix/store", "root/nix/store/..", "root/nix/store/../store"])
def test_files_that_are_not_in_the_store(chroot: StoreLocation, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is not in the store /nix/store"):
        chroot.resolve(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", [".links/x", "trash", "1" * 32, f"{'e' * 32}-x"])
def test_names_in_the_store_that_are_no_store_paths(chroot: StoreLocation, name: str) -> None:
    with pytest.raises(BadInput):
        chroot.resolve(f"/nix/store/{name}")


def test_links_that_lead_in_circles(chroot: StoreLocation, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a/x")
    with pytest.raises(BadInput, match="more than 40 symlinks"):
        chroot.resolve(f"{tmp_path}/a")


@given(name=st.text("a/.\0\ud800é" + "1" * 32 + "-", max_size=20))
@example(name="x" * 300)
@example(name="\0")
@settings(max_examples=60)
def test_any_name_is_a_store_path_or_clearly_none(name: str) -> None:
    for prefix in ("", "/", "/nix/store/"):
        with suppress(BadInput, NotFound):
            locate("/nowhere", {}).resolve(prefix + name)


def test_what_can_be_read_here(chroot: StoreLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chroot.real_path(HELLO) == HELLO.full(chroot.real_store_dir)
    assert chroot.real_path(WORLD) == WORLD.full(chroot.real_store_dir)  # a link, though it dangles outside
    assert chroot.real_path(StorePath("3" * 32, "none")) is None
    monkeypatch.setattr(os, "access", lambda _, wanted: not wanted & os.X_OK)
    assert chroot.real_path(HELLO) is None


def test_what_the_name_alone_tells() -> None:
    """No file is looked at: none of these directories exists."""
    assert ROOT.resolve_name(f"/nix/store/{HELLO}") == ROOT.resolve_name(f"/r/nix//store/./{HELLO}/bin/x") == HELLO
    for other in (f"nix/store/{HELLO}", f"/elsewhere/{HELLO}", "/nix/store", "/nix/store/..", "./result", ""):
        assert ROOT.resolve_name(other) is None
    with pytest.raises(BadInput):
        ROOT.resolve_name("/nix/store/no-path")
