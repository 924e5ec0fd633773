"""`cachesrv check-config`: what it prints acts as what it read; a probe finds what the server would stumble over."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.cli import run
from cachesrv.config import Cache, Config, Server, Token, load
from cachesrv.services.effective import render

VECTORS = Path(__file__).parents[1] / "vectors"
NOBODY = 65534


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "data"
    monkeypatch.setenv("CACHESRV_DATA_DIR", str(directory))
    return directory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachesrv.toml"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def loaded_again(text: str, file: Path, data_dir: Path) -> Config:
    file.write_text(text)
    return load(file, data_dir, {})


def test_what_it_prints_acts_as_the_defaults(file: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Places that follow from others are spelled out, all else is the same; and nothing is made."""
    assert run(["check-config"]) == 0
    printed = capsys.readouterr().out
    config, defaults = loaded_again(printed, file, data_dir), Config(data_dir)
    assert (config.server, config.lookup, config.token) == (defaults.server, defaults.lookup, defaults.token)
    assert config.storage.path == f"{data_dir}/objects"
    assert config.catalog.url == f"sqlite:///{data_dir}/catalog.sqlite"
    assert config.index.path == f"{data_dir}/index"
    assert config.cache == (Cache("main", prefix="main", root=True),)
    assert printed.startswith(f'# data directory: "{data_dir}"\n')
    assert "# signing_key_files: " in printed
    assert render(config) == printed
    assert not data_dir.exists()


def test_it_shows_what_variables_say(
    file: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[lookup]\nnegative_ttl = '2 min'\n")
    monkeypatch.setenv("CACHESRV_CACHE__0__PRIORITY", "17")
    assert run(["check-config", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "priority = 17\n" in printed
    assert "negative_ttl = 120\n" in printed


texts = st.text(st.characters(codec="utf-8"), max_size=10)


@given(st.tuples(texts, texts), st.integers(0, 2**63 - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_text_survives(paths: tuple[str, str], size: int, flag: bool) -> None:
    config = Config(
        Path("/data"),
        server=Server(tls_certificate=paths[0], tls_private_key=paths[1], max_nar_size=size),
        cache=(Cache("a", prefix="b", public=flag, signing_key_files=paths), Cache("c", prefix="c")),
        token=(Token("t", "0" * 64, permissions=("pull", "admin")),),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_args, **_kwargs: render(config))
        again = load(Path("x"), Path("/data"), {})
    places = {name: getattr(config, name) for name in ("storage", "catalog", "index", "delivery")}
    assert msgspec.structs.replace(again, **places) == config


def test_all_mistakes_and_status_2(file: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("[server]\nworkers = 0\nfoo = 1\n[[cache]]\nname = 'a b'\n")
    assert run(["check-config", "--config", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(key in said.err for key in ("server.workers = 0", "server.foo", "cache[0].name = 'a b'"))


def test_what_has_the_right_form_and_means_nothing(
    file: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "a-1:" + "A" * 42 + "B="  # bits that no 32 bytes have
    file.write_text(f"[server]\nlisten = ['1.2.3.4:99999']\n[[cache]]\nname = 'a'\ntrusted_keys = ['{key}']\n")
    assert run(["check-config", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "server.listen = '1.2.3.4:99999'" in said
    assert f"trusted_keys: '{key}'" in said


def test_probe_of_a_new_directory(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check-config", "--probe"]) == 0
    assert "[server]" in capsys.readouterr().out
    assert not list((data_dir / "keys").iterdir())
    assert not [path for path in (data_dir / "objects").rglob("*") if path.is_file()]
    assert run(["check-config", "--probe"]) == 0


def test_probe_leaves_published_data_alone(data_dir: Path) -> None:
    assert run(["check-config", "--probe"]) == 0
    objects = data_dir / "objects"
    shutil.copytree(VECTORS / "cache", objects / "main", dirs_exist_ok=True)
    before = snapshot(objects)
    assert run(["check-config", "--probe"]) == 0
    assert snapshot(objects) == before


def test_probe_tells_all_that_is_wrong(file: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir.mkdir()
    for name in ("objects", "index"):
        (data_dir / name).write_text("a file is in the way")
    (data_dir / "catalog.sqlite").write_text("no database")
    (data_dir / "bad.secret").write_text("geheim")
    good = VECTORS / "keys" / "cache.test-1.secret"
    file.write_text(
        f"""
        [server]
        listen = ["unix:{data_dir}/run/socket"]
        tls_certificate = "{file}"
        tls_private_key = "{file}"
        [[cache]]
        name = "main"
        signing_key_files = ["{good}", "{data_dir}/none.secret", "{data_dir}/bad.secret"]
        """
    )
    assert run(["check-config", "--config", str(file), "--probe"]) == 2
    lines = capsys.readouterr().err.removeprefix("cachesrv: ").splitlines()
    assert [line.split(":")[0].split(" = ")[0] for line in lines] == [
        "server.listen",
        "cache main",
        "cache main",
        "server",
        "storage",
        "catalog",
        "index",
    ]
    assert "none.secret cannot be read" in lines[1]
    assert "bad.secret is not a secret key" in lines[2]
    assert lines[3].startswith(f"server: {file} and {file} are no certificate and its key (PEM): ")
    assert "geheim" not in "".join(lines)


def test_probe_names_the_file_of_tls_that_cannot_be_read(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(f"""[server]\ntls_certificate = "{file}"\ntls_private_key = "{file}.gone"\n""")
    assert run(["check-config", "--config", str(file), "--probe"]) == 2
    assert f"server: tls_private_key: {file}.gone cannot be read: No such file or directory" in capsys.readouterr().err


def test_probe_of_a_data_directory_that_cannot_be_made(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir.write_text("a file")
    assert run(["check-config", "--probe"]) == 2
    assert str(data_dir) in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_probe_as_another_user(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Root is told to be the owner; a user who may not write is told so."""
    assert run(["check-config", "--probe"]) == 0
    for path in (data_dir, *data_dir.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    capsys.readouterr()
    assert run(["check-config", "--probe"]) == 2
    assert "belongs to nobody" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_probe_where_nothing_can_be_written() -> None:
    """In a process of its own, which gives its rights away when all is made."""
    program = f"""if True:
        import os, sys
        from pathlib import Path
        from cachesrv.cli import run
        assert run(["check-config", "--probe"]) == 0
        for path in Path(os.environ["CACHESRV_DATA_DIR"]).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
        sys.exit(run(["check-config", "--probe"]))
        """
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are below a private one
        Path(folder).chmod(0o755)
        environ = {**os.environ, "CACHESRV_DATA_DIR": folder}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 2, done.stderr
    said = [line.removeprefix("cachesrv: ").split(":")[0] for line in done.stderr.splitlines()]
    assert said == ["storage", "catalog", "index"]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check-config", "--help"]) == 0
    assert "  cachesrv check-config --config" in capsys.readouterr().out.split("Example")[1]
