"""`cachesrv key` against Nix's own keys and signatures."""

import io
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.cli import run
from cachesrv.nix import narinfo, narinfo_signatures
from cachesrv.nix.signing import SecretKey, trusted_keys, verify_any
from tests.strategies import narinfos

VECTORS = Path(__file__).parents[1] / "vectors"
KEYS = VECTORS / "keys"
SECRET = KEYS / "cache.test-1.secret"


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> "Stdin":
    return Stdin(monkeypatch)


class Stdin:
    """What the command reads; no terminal, whoever runs the tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def hold(self, data: bytes) -> None:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as Nix writes it."""
    return Path(shutil.copytree(VECTORS / "cache", tmp_path / "cache"))


def test_generate_writes_a_private_file_that_nix_understands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    old = os.umask(0)
    try:
        assert run(["key", "generate", "cache.example.org-1", "--output", str(file)]) == 0
    finally:
        os.umask(old)
    printed = capsys.readouterr().out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    convert = ["nix", "--extra-experimental-features", "nix-command", "key", "convert-secret-to-public"]
    public = subprocess.run(convert, input=file.read_bytes(), capture_output=True, check=True).stdout
    assert printed.strip() == public.decode().strip()
    assert printed.startswith("cache.example.org-1:")
    assert "PRIVATE" not in printed
    assert file.read_text().strip() not in printed


def test_generate_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key"
    file.write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    assert run(["key", "generate", "a-1", "--output", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(["key", "generate", "a-1", "--output", str(tmp_path / "link")]) == 2
    assert file.read_text() == "precious"
    assert {entry.name for entry in tmp_path.iterdir()} == {"key", "link"}


def test_generate_prints_the_secret_into_a_pipe_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["key", "generate", "a-1"]) == 0
    assert SecretKey.parse(capsys.readouterr().out).name == "a-1"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["key", "generate", "a-1"]) == 2
    said = capsys.readouterr()
    assert "--output" in said.err
    assert said.out == ""


@pytest.mark.parametrize("name", ["", "a b", "a:b", "ä", "x" * 256])
def test_generate_refuses_names_that_no_key_may_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", "generate", name]) == 2
    assert "NAME" in capsys.readouterr().err


def test_generate_into_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", "generate", "a-1", "--output", str(tmp_path / "x" / "key")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_public(capsys: pytest.CaptureFixture[str], stdin: Stdin) -> None:
    expected = (KEYS / "cache.test-1.public").read_text().strip()
    assert run(["key", "public", str(SECRET)]) == 0
    assert capsys.readouterr().out.strip() == expected
    stdin.hold(SECRET.read_bytes())
    assert run(["key", "public", "-"]) == 0
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize("content", [b"", b"geheim", b"a-1:Z2VoZWlt", b"\xff\xfe", b"a" * 100_000])
def test_public_of_what_is_no_secret_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stdin: Stdin, content: bytes
) -> None:
    """The message names the file and nothing that is in it."""
    file = tmp_path / "key"
    file.write_bytes(content)
    stdin.hold(content)
    for source in (str(file), "-"):
        assert run(["key", "public", source]) == 2
        said = capsys.readouterr().err
        assert "geheim" not in said
        assert "Z2Vo" not in said
    assert run(["key", "public", str(tmp_path / "none")]) == 2


def test_sign_in_place_as_nix_verifies_it(cache: Path, tmp_path: Path) -> None:
    """Both keys at once; what Nix says of the folder is what counts."""
    secret = tmp_path / "new.secret"
    assert run(["key", "generate", "new-1", "--output", str(secret)]) == 0
    files = sorted(cache.glob("*.narinfo"))
    assert run(["key", "sign", "--key-file", str(secret), *map(str, files)]) == 0
    key = SecretKey.parse(secret.read_text()).public
    for file in files:
        info = narinfo.parse(file.read_bytes())
        assert verify_any(info.fingerprint, info.signatures, trusted_keys([key]))
    program = narinfo.parse(next(file for file in files if b"-program-1.0\n" in file.read_bytes()).read_bytes())
    verify = ["nix", "--extra-experimental-features", "nix-command", "store", "verify", "--store", f"file://{cache}"]
    verify += ["--option", "trusted-public-keys", key.render(), "--sigs-needed", "1", program.full_path]
    subprocess.run(verify, check=True, capture_output=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})


def test_sign_changes_nothing_but_the_signature(cache: Path) -> None:
    """Nix signed these with the same key: they are its bytes again when the signature was wrong before."""
    unknown = b"X-Unknown: \xff kept\n"
    files = [file for file in cache.glob("*.narinfo") if b"\nSig: cache.test-2:" in file.read_bytes()]
    assert files
    for file in files:
        original = file.read_bytes() + unknown
        wrong = b"\nSig: cache.test-2:" + b"A" * 86 + b"==\n"
        lines = [wrong.strip() if b": cache.test-2:" in line else line for line in original.splitlines()]
        file.write_bytes(b"\n".join(lines) + b"\n")
        file.chmod(0o640)
        assert run(["key", "sign", "--key-file", str(KEYS / "cache.test-2.secret"), str(file)]) == 0
        assert file.read_bytes() == original
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_sign_again_does_not_touch_the_file(cache: Path) -> None:
    files = [str(file) for file in cache.glob("*.narinfo")]
    assert run(["key", "sign", "--key-file", str(SECRET), *files]) == 0
    before = {file: (Path(file).stat().st_ino, Path(file).read_bytes()) for file in files}
    assert run(["key", "sign", "--key-file", str(SECRET), *files]) == 0
    assert {file: (Path(file).stat().st_ino, Path(file).read_bytes()) for file in files} == before


def test_sign_names_from_stdin_and_names_what_failed(
    cache: Path, tmp_path: Path, stdin: Stdin, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next(cache.glob("*.narinfo"))
    bad = tmp_path / "bad.narinfo"
    bad.write_text("StorePath: nonsense\n")
    stdin.hold(f"{bad}\n{tmp_path}/none\n\n{tmp_path}\n{good}\n".encode())
    assert run(["key", "sign", "--stdin", "--key-file", str(SECRET)]) == 3
    said = capsys.readouterr().err
    assert said.count("cachesrv: ") == 3
    assert all(str(name) in said for name in (bad, tmp_path / "none"))
    assert b"\nSig: cache.test-1:" in good.read_bytes()
    assert bad.read_text() == "StorePath: nonsense\n"


def test_sign_follows_a_link_and_leaves_it(cache: Path, tmp_path: Path) -> None:
    file = next(cache.glob("*.narinfo"))
    link = tmp_path / "link"
    link.symlink_to(file)
    assert run(["key", "sign", "--key-file", str(SECRET), str(link)]) == 0
    assert link.is_symlink()
    assert b"\nSig: cache.test-1:" in file.read_bytes()


def test_sign_stdin_to_stdout(cache: Path, stdin: Stdin, monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(cache.glob("*.narinfo")).read_bytes()
    stdin.hold(data)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
    assert run(["key", "sign", "--key-file", str(SECRET), "-"]) == 0
    assert out.getvalue() == narinfo_signatures.sign(data, [SecretKey.parse(SECRET.read_text())])


@pytest.mark.parametrize("arguments", [["x"], ["--key-file", "K"], ["--key-file", "K", "--stdin", "-"]])
def test_sign_wrong_usage(arguments: list[str]) -> None:
    arguments = [str(SECRET) if argument == "K" else argument for argument in arguments]
    assert run(["key", "sign", *arguments]) == 2


def test_sign_without_a_key(cache: Path) -> None:
    file = next(cache.glob("*.narinfo"))
    assert run(["key", "sign", "--key-file", "/nonexistent", str(file)]) == 2


@given(narinfos, st.lists(st.sampled_from(("one", "two")), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_signing_is_what_render_would_write(info: narinfo.NarInfo, names: list[str]) -> None:
    keys = [SecretKey.parse((KEYS / f"cache.test-{1 + (name == 'two')}.secret").read_text()) for name in names]
    signed = narinfo_signatures.sign(narinfo.render(info), keys)
    parsed = narinfo.parse(signed)
    assert signed == narinfo.render(parsed)
    assert set(parsed.signatures) == {*info.signatures, *(key.sign(info.fingerprint) for key in keys)}
    assert narinfo_signatures.sign(signed, keys) == signed
    assert narinfo.parse(signed).fingerprint == info.fingerprint


@pytest.mark.parametrize("arguments", [[], ["generate"], ["public"], ["sign"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", *arguments, "--help"]) == 0
    assert f"  cachesrv key {' '.join(arguments)}" in capsys.readouterr().out.split("Example")[1]
