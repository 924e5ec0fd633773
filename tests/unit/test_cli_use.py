"""`cachesrv use` with a real server, judged by what the installed Nix then does."""

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachesrv.cli import run
from cachesrv.push import nix_conf, nix_conf_files
from tests.system.server import Server

CONFIG = """
[[cache]]
name = "main"
root = true
[[cache]]
name = "private"
public = false
[[cache]]
name = "unsigned"
signing_key_files = []
"""
NOBODY = 65534


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), config=CONFIG).start()
    yield server
    server.dispose()


class Home:
    """A user on a machine without settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / ".config" / "nix" / "nix.conf"
        self.netrc = folder / ".config" / "nix" / "netrc"
        self.system = folder / "etc"
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "NIX_CONF_DIR": str(self.system)}

    def nix(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["nix", "--extra-experimental-features", "nix-command", *arguments]
        with tempfile.TemporaryDirectory() as cache:  # it remembers which caches there are
            environ = self.environ | {"XDG_CACHE_HOME": cache}
            return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

    def settings(self) -> dict[str, str]:
        """What Nix has for settings."""
        shown = self.nix("show-config").stdout
        return dict(line.split(" = ", 1) for line in shown.splitlines() if " = " in line)

    def files(self) -> dict[str, tuple[bytes, int]]:
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_ino) for path in found}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    home = Home(tmp_path)
    for name in (
        "XDG_CONFIG_HOME",
        "NIX_USER_CONF_FILES",
        "NETRC",
        "CACHESRV_URL",
        "CACHESRV_TOKEN",
        "STATE_DIRECTORY",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in home.environ.items():
        monkeypatch.setenv(name, value)
    return home


@pytest.fixture
def token_file(server: Server) -> str:
    return str(server.data_dir / "push-token")


def public_key(server: Server, cache: str) -> str:
    return (server.data_dir / "keys" / f"{cache}.public").read_text().strip()


def test_prints_and_writes_nothing(server: Server, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["use", server.main]) == 0
    assert capsys.readouterr().out == (
        f"# {home.conf}\nextra-substituters = {server.main}\nextra-trusted-public-keys = {public_key(server, 'main')}\n"
    )
    assert not home.files()


def test_write_is_what_nix_reads(server: Server, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.conf.parent.mkdir(parents=True)
    home.conf.write_text("cores = 3\nsubstituters = http://other\n")
    assert run(["use", server.main, "--write"]) == 0
    assert f"{home.conf}: wrote {server.main} {public_key(server, 'main')}" in capsys.readouterr().out
    settings = home.settings()
    assert settings["cores"] == "3"
    assert settings["substituters"].split() == ["http://other", server.main]
    assert public_key(server, "main") in settings["trusted-public-keys"].split()
    assert home.nix("store", "ping", "--store", server.main).returncode == 0


def test_a_second_time_changes_nothing(
    server: Server, home: Home, token_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["use", f"{server.url}/private", "--write", "--token-file", token_file]
    assert run(command) == 0
    before = home.files()
    capsys.readouterr()
    assert run(command) == 0
    assert home.files() == before
    assert capsys.readouterr().out == "".join(f"{path}: all is there already\n" for path in (home.netrc, home.conf))


def test_a_changed_key_replaces_the_old_one(server: Server, home: Home) -> None:
    assert run(["use", server.main, "--write"]) == 0
    right = home.conf.read_text()
    home.conf.write_text(re.sub(r"main-1:\S+", f"main-1:{'A' * 43}=", right) + "cores = 3\n")
    home.conf.chmod(0o600)
    assert run(["use", server.main, "--write"]) == 0
    assert home.conf.read_text() == right + "cores = 3\n"
    assert stat.S_IMODE(home.conf.stat().st_mode) == 0o600


def test_a_private_cache_opens_for_nix(
    server: Server, home: Home, token_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}/private"
    old = os.umask(0)
    try:
        assert run(["use", url, "--write", "--token-file", token_file]) == 0
    finally:
        os.umask(old)
    said = capsys.readouterr()
    assert server.token not in said.out + said.err
    assert "token create clients --cache private" in said.err
    assert stat.S_IMODE(home.netrc.stat().st_mode) == 0o600
    assert home.settings()["netrc-file"] == str(home.netrc)
    assert home.nix("store", "ping", "--store", url).returncode == 0
    home.netrc.unlink()
    assert home.nix("store", "ping", "--store", url).returncode != 0


def test_a_private_cache_prints_both(
    server: Server, home: Home, token_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["use", f"{server.url}/private", "--token-file", token_file]) == 0
    printed = capsys.readouterr().out
    assert f"netrc-file = {home.netrc}\n" in printed
    assert f"\n# {home.netrc}\nmachine 127.0.0.1 login cachesrv password {server.token}\n" in printed


def test_a_private_cache_wants_a_token(server: Server, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["use", f"{server.url}/private", "--write"]) == 1
    assert "--token-file" in capsys.readouterr().err
    assert not home.files()


def test_a_netrc_that_is_set_already_is_used(server: Server, home: Home, token_file: str, tmp_path: Path) -> None:
    other = tmp_path / "my netrc"
    other.write_text("machine example.org login a password b\n")
    other.chmod(0o644)
    home.conf.parent.mkdir(parents=True)
    home.conf.write_text(f"netrc-file = {other}\n")
    assert run(["use", f"{server.url}/private", "--write", "--token-file", token_file]) == 0
    assert home.conf.read_text().count("netrc-file") == 1
    assert other.read_text() == (
        f"machine 127.0.0.1 login cachesrv password {server.token}\nmachine example.org login a password b\n"
    )
    assert stat.S_IMODE(other.stat().st_mode) == 0o640
    assert home.nix("store", "ping", "--store", f"{server.url}/private").returncode == 0


def test_system_writes_for_all_users(
    server: Server, home: Home, token_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["use", f"{server.url}/private", "--write", "--system", "--token-file", token_file]) == 0
    assert "restart nix-daemon" in capsys.readouterr().err
    assert not home.conf.exists()
    assert stat.S_IMODE((home.system / "nix.conf").stat().st_mode) == 0o644
    assert stat.S_IMODE((home.system / "netrc").stat().st_mode) == 0o600
    assert home.settings()["netrc-file"] == str(home.system / "netrc")


def test_several_caches_side_by_side(server: Server, home: Home, token_file: str) -> None:
    for cache in ("main", "private", "unsigned", "main"):
        assert run(["use", f"{server.url}/{cache}", "--write", "--token-file", token_file]) == 0
    urls = home.settings()["substituters"].split()[1:]
    assert urls == [f"{server.url}/{cache}" for cache in ("main", "private", "unsigned")]


def test_a_cache_without_a_key_says_so(server: Server, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["use", f"{server.url}/unsigned"]) == 0
    said = capsys.readouterr()
    assert "trusted-public-keys" not in said.out
    assert "does not sign" in said.err


@pytest.mark.parametrize("system", [False, True])
def test_another_key_of_the_same_name(
    server: Server, home: Home, capsys: pytest.CaptureFixture[str], *, system: bool
) -> None:
    """In the file that is written, and in that of the machine."""
    file = home.system / "nix.conf" if system else home.conf
    file.parent.mkdir(parents=True)
    file.write_text(f"extra-trusted-public-keys = main-1:{'A' * 43}=\n")
    before = home.files()
    assert run(["use", server.main, "--write"]) == 2
    assert f"{file}: another key called main-1" in capsys.readouterr().err
    assert home.files() == before


def test_files_that_are_made_otherwise_are_left_alone(
    server: Server, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """home-manager has a link into the store here."""
    store = home.folder / "store"
    store.mkdir()
    (store / "made.conf").write_text("cores = 3\n")
    monkeypatch.setenv("NIX_STORE_DIR", str(store))
    home.conf.parent.mkdir(parents=True)
    home.conf.symlink_to(store / "made.conf")
    assert run(["use", server.main, "--write"]) == 2
    said = capsys.readouterr().err
    assert "home-manager" in said
    assert (store / "made.conf").read_text() == "cores = 3\n"


def test_another_store_directory_is_told(
    server: Server, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NIX_STORE_DIR", "/other/store")
    assert run(["use", server.main]) == 0
    assert "/other/store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("{url}/nothing", (1, "no cache nothing")),
        ("http://127.0.0.1:1/main", (1, "cannot be reached")),
        ("ftp://x", (2, "not the URL of a cache")),
    ],
)
def test_wrong_urls(
    server: Server, home: Home, capsys: pytest.CaptureFixture[str], url: str, expected: tuple[int, str]
) -> None:
    status, message = expected
    assert run(["use", url.format(url=server.url)]) == status
    assert message in capsys.readouterr().err


def test_the_url_may_come_from_elsewhere(
    server: Server, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CACHESRV_URL", server.main)
    assert run(["use"]) == 0
    assert server.main in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize(
    ("trusted", "daemon", "distrusted"),
    [
        ("root", True, True),
        ("root nobody", True, False),
        ("@nogroup", True, False),
        ("*", True, False),
        ("root", False, False),
    ],
)
def test_whom_the_daemon_believes(trusted: str, *, daemon: bool, distrusted: bool) -> None:
    """In a process of its own, which gives its rights away."""
    program = f"""if True:
        import os, sys
        from cachesrv.push.nix_conf_files import distrusts, system_files
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
        print(distrusts(os.environ, system_files(os.environ)))
        """
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are below a private one
        Path(folder).chmod(0o755)
        (Path(folder) / "nix.conf").write_text(f"trusted-users = {trusted}\n")
        socket = Path(folder) / "socket"
        if daemon:
            socket.touch()
        environ = {"NIX_CONF_DIR": folder, "NIX_STATE_DIR": folder, "NIX_DAEMON_SOCKET_PATH": str(socket)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environ)
    assert done.stdout.strip() == ("nobody" if distrusted else "None")


def test_files_stay_parsable_by_us(server: Server, home: Home) -> None:
    """What is written is found again through the same door."""
    assert run(["use", server.main, "--write"]) == 0
    found = list(nix_conf_files.lines(home.conf))
    assert nix_conf.words(found, nix_conf.SUBSTITUTERS) == [server.main]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["use", "--help"]) == 0
    assert "  cachesrv use https://" in capsys.readouterr().out.split("Example")[1]
