"""`cachesrv token` on a real catalog, judged by what the server's access check says of the tokens."""

import asyncio
import json
import stat
import time
from hashlib import sha256
from pathlib import Path

import pytest

from cachesrv import config, wiring
from cachesrv.cli import run
from cachesrv.errors import NotAuthenticated
from cachesrv.services.access import Access, Principal
from cachesrv.services.data_directory import DataDirectory


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a server which was started once."""
    directory = tmp_path / "data"
    directory.mkdir()
    monkeypatch.setenv("CACHESRV_DATA_DIR", str(directory))

    async def start() -> None:
        catalog = await wiring.open_catalog(config.load(None, directory, {}))
        await catalog.close()

    asyncio.run(start())
    DataDirectory(directory).token()
    return directory


def holder(data_dir: Path, token: str) -> Principal | None:
    """Who the server takes the holder of the token for."""

    async def ask() -> Principal | None:
        catalog = await wiring.open_catalog(config.load(None, data_dir, {}))
        try:
            return await Access([], catalog).require(token, "pull", "main")
        except NotAuthenticated:
            return None
        finally:
            await catalog.close()

    return asyncio.run(ask())


def created(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["token", "create", *arguments]) == 0
    return capsys.readouterr().out.strip()


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    assert run(["token", "list", "--json", *arguments]) == 0
    tokens = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {token["name"]: token for token in tokens}


def test_created_tokens_let_their_holders_in(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = created(capsys, "ci", "--permission", "push", "--permission", "delete", "--cache", "ma*")
    assert holder(data_dir, token) == Principal("ci", ("ma*",), frozenset({"push", "delete"}))
    reader = created(capsys, "reader")
    assert holder(data_dir, reader) == Principal("reader", ("*",), frozenset({"pull"}))
    assert token != reader


def test_only_the_hash_is_kept(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = created(capsys, "ci")
    kept = b"".join(file.read_bytes() for file in data_dir.glob("catalog.sqlite*"))
    assert token.encode() not in kept
    assert sha256(token.encode()).hexdigest().encode() in kept
    assert run(["token", "list"]) == 0
    assert token not in capsys.readouterr().out


def test_output_is_a_private_file(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    assert created(capsys, "ci", "--output", str(file)) == ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert holder(data_dir, file.read_text().strip()) is not None
    assert run(["token", "create", "other", "--output", str(file)]) == 2
    assert run(["token", "create", "lost", "--output", str(tmp_path / "no" / "token")]) == 1
    good = [name for name, token in listed(capsys).items() if token["state"] == "good"]
    assert sorted(good) == ["ci", "push-token"]


def test_expiry(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = created(capsys, "ci", "--expires", "1s")
    created(capsys, "later", "--expires", "30d")
    tokens = listed(capsys)
    ends = tokens["later"]["expires_at"]
    assert isinstance(ends, int)
    assert abs(ends - time.time() - 30 * 86400) < 60
    time.sleep(1.1)
    assert holder(data_dir, token) is None
    tokens = listed(capsys)
    assert (tokens["ci"]["state"], tokens["later"]["state"]) == ("expired", "good")


@pytest.mark.parametrize("value", ["", "0", "soon", "-1d", "99999999999w", "9" * 5000])
def test_wrong_expiry(data_dir: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert run(["token", "create", "ci", "--expires", value]) == 2
    assert "--expires" in capsys.readouterr().err


def test_a_name_is_used_once_until_it_is_revoked(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = created(capsys, "ci")
    assert run(["token", "create", "ci"]) == 1
    assert "already" in capsys.readouterr().err
    assert run(["token", "revoke", "ci"]) == 0
    assert holder(data_dir, first) is None
    second = created(capsys, "ci")
    assert holder(data_dir, second) is not None
    assert run(["token", "list"]) == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("ci ")]
    assert sorted(states) == ["good", "revoked"]


def test_revoke_what_is_not_there(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    created(capsys, "ci")
    assert run(["token", "revoke", "ci"]) == 0
    assert run(["token", "revoke", "ci"]) == 1
    assert "no good token named ci" in capsys.readouterr().err


def test_tokens_that_stand_elsewhere(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are listed, their names are taken, and revoke says where they are to be removed."""
    file = tmp_path / "cachesrv.toml"
    file.write_text(f"[[token]]\nname = 'robot'\nsha256 = '{'0' * 64}'\npermissions = ['admin']\n")
    created(capsys, "ci", "--config", str(file))
    tokens = listed(capsys, "--config", str(file))
    assert {name: (token["source"], token["permissions"]) for name, token in tokens.items()} == {
        "push-token": ("data directory", ["pull", "push"]),
        "robot": ("configuration", ["admin"]),
        "ci": ("catalog", ["pull"]),
    }
    for name, place in (("robot", "configuration"), ("push-token", "data directory")):
        assert run(["token", "create", name, "--config", str(file)]) == 1
        assert "already" in capsys.readouterr().err
        assert run(["token", "revoke", name, "--config", str(file)]) == 2
        assert place in capsys.readouterr().err


def test_the_table_is_for_people(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    created(capsys, "continuous integration", "--cache", "main", "--permission", "push")
    assert run(["token", "list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("continuous integration"))
    columns = [header.index(name) for name in ("STATE", "CACHES", "PERMISSIONS", "EXPIRES", "KEPT IN")]
    assert [row[column:].split()[0] for column in columns] == ["good", "main", "push", "never", "catalog"]


def test_a_cache_that_is_not_there(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "create", "ci", "--cache", "mian"]) == 2
    assert "there are main" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a\nb", "ä", " x", "x" * 101])
def test_names_that_no_token_may_have(data_dir: Path, name: str) -> None:
    assert run(["token", "create", name]) == 2


@pytest.mark.parametrize("arguments", [["create", "ci"], ["list"], ["revoke", "ci"]])
def test_a_mistyped_data_directory_is_not_made(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "none"):
        assert run(["token", *arguments, "--data-dir", str(directory)]) == 2
        assert "--data-dir" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("arguments", [[], ["create"], ["list"], ["revoke"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", *arguments, "--help"]) == 0
    assert f"  cachesrv token {' '.join(arguments)}" in capsys.readouterr().out.split("Example")[1]
