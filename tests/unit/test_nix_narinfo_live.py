"""Narinfos side by side with the installed Nix: it reads ours, we read its, both refuse the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from cachesrv.errors import BadInput
from cachesrv.nix.narinfo import NarInfo, parse, render
from cachesrv.nix.signing import SecretKey

EXPRESSION = 'builtins.toFile "program" "uses ${builtins.toFile "library" ""}"'
SHA256 = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"


class Nix:
    """Nix with its state, configuration and caches in `folder`; stores are named on each call."""

    def __init__(self, folder: Path) -> None:
        (folder / "nix.conf").write_text("experimental-features = nix-command\nsubstituters =\n")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "client"),
            "NIX_CONF_DIR": str(folder),
        }
        self._folder = folder

    def run(self, *command: str) -> str:
        return self.attempt(*command, check=True).stdout.strip()

    def attempt(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, check=check, env=self._environment, cwd=self._folder, capture_output=True, text=True
        )


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path)


@pytest.fixture
def cache(nix: Nix, tmp_path: Path) -> Path:
    """A cache as `nix copy` writes it, with two paths of which one refers to the other; unsigned."""
    path = json.loads(
        nix.run(
            "nix-instantiate", "--store", f"{tmp_path}/store", "--eval", "--json", "--read-write-mode", "-E", EXPRESSION
        )
    )
    nix.run("nix", "copy", "--store", f"{tmp_path}/store", "--to", f"file://{tmp_path}/cache", path)
    return tmp_path / "cache"


def program(cache: Path) -> tuple[Path, NarInfo]:
    """The path that refers to the other one, and its file."""
    for file in cache.glob("*.narinfo"):
        info = parse(file.read_bytes())
        if info.references:
            return file, info
    pytest.fail("nix copy wrote no path with references")


def test_what_nix_copies_is_written_again_to_the_byte(cache: Path) -> None:
    files = sorted(cache.glob("*.narinfo"))
    assert len(files) == 2
    for file in files:
        assert render(parse(file.read_bytes())) == file.read_bytes()


def test_nix_trusts_what_we_sign(nix: Nix, cache: Path, tmp_path: Path) -> None:
    secret = SecretKey.generate("ours-1")
    for file in cache.glob("*.narinfo"):
        # Without the content address nothing but the signature makes Nix take the path.
        bare = parse(file.read_bytes().partition(b"CA: ")[0])
        file.write_bytes(render(bare.add_signatures([secret.sign(bare.fingerprint)])))
    _, info = program(cache)
    copy = ["nix", "copy", "--store", f"{tmp_path}/second", "--from", f"file://{cache}", info.full_path]
    stranger = SecretKey.generate("ours-1").public.render()
    refused = nix.attempt(*copy, "--option", "trusted-public-keys", stranger)
    assert "lacks a valid signature" in refused.stderr
    nix.run(*copy, "--option", "trusted-public-keys", secret.public.render())
    assert nix.run("nix-store", "--store", f"{tmp_path}/second", "-q", "--hash", info.full_path) == info.nar_hash.nix32


def test_we_verify_what_nix_signs(nix: Nix, cache: Path, tmp_path: Path) -> None:
    secret = SecretKey.generate("ours-1")
    (tmp_path / "secret").write_text(secret.render())
    file, info = program(cache)
    nix.run("nix", "store", "sign", "--store", f"file://{cache}", "-k", f"{tmp_path}/secret", info.full_path)
    assert parse(file.read_bytes()) == info.add_signatures([secret.sign(info.fingerprint)])


def test_an_odd_narinfo_is_normalised_as_nix_does(nix: Nix, cache: Path, tmp_path: Path) -> None:
    secret = SecretKey.generate("zz")
    (tmp_path / "secret").write_text(secret.render())
    file, info = program(cache)
    store_path, reference = info.store_path.base_name, info.references[0].base_name
    file.write_text(
        f"Odd: \nReferences: \nNarSize:\t{info.nar_size}\nNarHash: {info.nar_hash.sri}\nSystem: s390-linux\n"
        f"References: {store_path}  {reference} {store_path} \nDeriver: {store_path}\nDeriver: unknown-deriver\nCA: \n"
        f"URL: first\nURL: nar/x.nar?a=b\nFileHash: {info.nar_hash.base16}\nFileSize: 007\n"
        f"StorePath: /nix/store/{reference}\nStorePath: {info.full_path}\nCompression: \n"
    )
    odd = parse(file.read_bytes())
    nix.run("nix", "store", "sign", "--store", f"file://{cache}", "-k", f"{tmp_path}/secret", info.full_path)
    assert file.read_bytes() == render(odd.add_signatures([secret.sign(odd.fingerprint)]))


GOOD: dict[str, str | None] = {
    "URL": "nar/x.nar",
    "Compression": "none",
    "FileHash": SHA256,
    "FileSize": "96",
    "NarHash": SHA256,
    "NarSize": "96",
    "Colour": None,
    "References": "",
}
ODD: list[dict[str, str | None]] = [
    {"URL": None},
    {"URL": ""},
    {"Compression": None},
    {"NarHash": None},
    {"NarHash": SHA256.removeprefix("sha256:")},
    {"NarHash": SHA256[:-1]},
    {"NarHash": SHA256.replace("sha256:0", "sha256:2")},
    {"NarSize": None},
    {"NarSize": "0"},
    {"NarSize": "x"},
    {"NarSize": "-1"},
    {"NarSize": " 96"},
    {"FileSize": None},
    {"FileSize": ""},
    {"References": None},
    {"References": "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0"},
    {"References": "/nix/store/vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo"},
    {"References": "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo\nReferences: "},
    {"References": "\nReferences: vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo"},
    {"References": "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo\r"},
    {"Deriver": ""},
    {"Deriver": "unknown-deriver"},
    {"Deriver": "x.drv"},
    {"CA": ""},
    {"CA": "text"},
    {"CA": f"text:{SHA256}\nCA: text:{SHA256}"},
    {"CA": f"fixed:r:{SHA256}"},
    {"Colour": "blue: "},
    {"Colour": "\n"},
    {"Colour": "\nblue"},
]


def test_what_nix_refuses_is_refused(nix: Nix, cache: Path) -> None:
    file, info = program(cache)
    verdicts = []
    for change in ODD:
        fields = {"StorePath": info.full_path} | GOOD | change
        data = "".join(f"{key}: {value}\n" for key, value in fields.items() if value is not None).encode()
        file.write_bytes(data)
        refused = nix.attempt("nix", "path-info", "--store", f"file://{cache}", info.full_path).returncode != 0
        verdicts.append((change, refused, not is_read(data)))
    assert [verdict for verdict in verdicts if verdict[1] and not verdict[2]] == []
    # Nix takes a blank line, or one without a colon, for the beginning of the next line's key.
    stricter = [change for change, by_nix, by_us in verdicts if by_us and not by_nix]
    assert stricter == [change for change in ODD if "Colour" in change and "\n" in str(change["Colour"])]
    assert any(refused for _, refused, _ in verdicts)


def is_read(data: bytes) -> bool:
    try:
        parse(data)
    except BadInput:
        return False
    return True
