"""`cachesrv ls` and `cat` on caches that Nix wrote, over HTTP with its faults, and on the files of a store."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import brotli  # type: ignore[import-untyped]  # the package has no stubs
import pytest

from cachesrv.cli import run
from cachesrv.nix import listing, narinfo
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar_writer import dump
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.seekable import compress_zstd
from cachesrv.nix.store_path import StorePath
from cachesrv.push.retry import Backoff
from tests.folder_server import FolderServer, serving
from tests.system.server import Server, peak_memory

VECTORS = Path(__file__).parents[1] / "vectors"
PROGRAM = "44rvqg0rc9bs0d4s864jm0zqzqmcxfc8-program-1.0"
NONE = "00000000000000000000000000000000"
NIX = ("nix", "--extra-experimental-features", "nix-command")


@dataclass(frozen=True)
class Sample:
    """A store path with more than a small NAR, in a chroot store and in a cache of each compression."""

    root: Path
    path: StorePath
    tree: Path
    environ: dict[str, str]
    caches: dict[str, Path]

    def read(self, name: str) -> bytes:
        return (self.tree / name).read_bytes()


def make_tree(tree: Path) -> None:
    noise = random.Random(1)
    for folder in ("bin", "etc/empty", "zz"):
        (tree / folder).mkdir(parents=True)
    (tree / "bin" / "large").write_bytes(noise.randbytes(1_500_001))
    (tree / "bin" / "tool").write_bytes(b"#!/bin/sh\n" + noise.randbytes(1000))
    (tree / "bin" / "tool").chmod(0o755)
    (tree / "bin" / "alias").symlink_to("tool")
    (tree / "etc" / "conf").write_text("contents\n")
    (tree / "etc" / "nothing").touch()
    (tree / "etc" / "out").symlink_to("/elsewhere/x")
    (tree / "etc" / "with blank\x1b[31m?").write_text("odd")
    (tree / "zz" / "last").write_bytes(noise.randbytes(2_000_003))


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("sample")
    tree = folder / "tree"
    make_tree(tree)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "NIX_REMOTE": str(folder / "root"),
        "NIX_CONF_DIR": "/none",
    }
    environ["NIX_CONFIG"] = "build-users-group ="

    def nix(*command: str) -> str:
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip()

    full = nix("nix-store", "--add", str(tree))
    caches = {compression: folder / compression for compression in ("none", "xz", "zstd")}
    for compression, cache in caches.items():
        options = f"compression={compression}&write-nar-listing=true&compression-level=1"
        nix(*NIX, "copy", "--to", f"file://{cache}?{options}", full)
    path = StorePath.parse_full(full, "/nix/store")
    caches["seekable"] = seekable(folder / "seekable", caches["none"], path)
    return Sample(folder / "root", path, tree, environ, caches)


def seekable(folder: Path, plain: Path, path: StorePath) -> Path:
    """The same cache with the NAR as cachesrv writes it, in small frames."""
    shutil.copytree(plain, folder)
    file = folder / f"{path.hash_part}.narinfo"
    info = narinfo.parse(file.read_bytes())
    data = b"".join(compress_zstd([(plain / info.url).read_bytes()], frame_size=256 * 1024))
    (folder / info.url).unlink()
    url = f"nar/{info.nar_hash.bare_nix32}.nar.zst"
    (folder / url).write_bytes(data)
    changed = replace(info, url=url, compression="zstd", file_hash=Hash.of("sha256", data), file_size=len(data))
    file.write_bytes(narinfo.render(changed))
    return folder


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, no store."""
    for name in ("CACHESRV_URL", "CACHESRV_TOKEN", "NETRC", "XDG_CONFIG_HOME", "NIX_USER_CONF_FILES", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NIX_CONF_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NIX_REMOTE", str(tmp_path / "no-store"))


@pytest.fixture(params=["none", "xz", "zstd", "seekable"])
def served(sample: Sample, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FolderServer]:
    """The sample's cache, by compression."""
    folder = Path(shutil.copytree(sample.caches[request.param], tmp_path / "cache"))
    with serving(FolderServer(folder)) as server:
        yield server


@pytest.fixture
def vectors(tmp_path: Path) -> Iterator[FolderServer]:
    """Small paths, signed by two keys."""
    folder = Path(shutil.copytree(VECTORS / "cache", tmp_path / "vectors"))
    with serving(FolderServer(folder)) as server:
        yield server


class Out(io.TextIOWrapper):
    """Standard output, with the bytes that went there."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, write_through=True)


Cat = Callable[..., bytes]


@pytest.fixture
def cat(monkeypatch: pytest.MonkeyPatch) -> Cat:
    """What a `cachesrv cat` that ends with this status prints."""

    def printed(*arguments: str, status: int = 0) -> bytes:
        out = Out()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert run(["cat", *arguments]) == status
        return out.bytes.getvalue()

    return printed


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(["ls", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def change(folder: Path, path: StorePath, **changes: Any) -> NarInfo:
    """Make a narinfo say something else."""
    file = folder / f"{path.hash_part}.narinfo"
    info = replace(narinfo.parse(file.read_bytes()), **changes)
    file.write_bytes(narinfo.render(info))
    return info


def without_offsets(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: without_offsets(value) for key, value in node.items() if key != "narOffset"}
    return node


def test_ls_is_what_nix_says(sample: Sample, served: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    """By the listing of the cache, by the NAR when there is none or it is not to be trusted, and by the files."""
    command = [*NIX, "store", "ls", "--json", "-R", "--store", f"file://{sample.caches['none']}"]
    full = sample.path.full("/nix/store")
    nix = json.loads(subprocess.run([*command, full], env=sample.environ, check=True, capture_output=True).stdout)
    url = f"{served.url}/{sample.path}"

    def like_nix(node: dict[str, Any]) -> dict[str, Any]:
        """2.8.0 leaves out what is false or zero."""
        inside = {"entries": {name: like_nix(child) for name, child in node.get("entries", {}).items()}}
        kept = {key: value for key, value in node.items() if value not in (False, {}) and key != "entries"}
        return kept | (inside if "entries" in node else {})

    by_listing = listed(capsys, "-R", url)
    assert like_nix(by_listing) == like_nix(nix)
    assert served.nar_bytes == 0
    assert listed(capsys, "-R", "--verify", url) == by_listing
    assert served.nar_bytes > 0
    (served.folder / f"{sample.path.hash_part}.ls").unlink()
    assert listed(capsys, "-R", url) == by_listing
    local = subprocess.run(
        [sys.executable, "-m", "cachesrv", "ls", "--json", "-R", full],
        env=sample.environ,
        check=True,
        capture_output=True,
    )
    assert json.loads(local.stdout) == without_offsets(by_listing)


def test_ls_of_one_level(sample: Sample, served: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{served.url}/{sample.path}"
    assert listed(capsys, url) == {
        "type": "directory",
        "entries": {name: {"type": "directory"} for name in ("bin", "etc", "zz")},
    }
    assert run(["ls", f"{url}/bin"]) == 0
    assert capsys.readouterr().out == "alias\nlarge\ntool\n"
    assert run(["ls", url, "etc"]) == 0
    assert capsys.readouterr().out == "conf\nempty\nnothing\nout\nwith blank\\x1b[31m?\n"
    assert run(["ls", "-l", url, "bin"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["lrwxrwxrwx", "0", "alias", "->", "tool"],
        ["-r--r--r--", "1500001", "large"],
        ["-r-xr-xr-x", "1010", "tool"],
    ]
    assert run(["ls", "-l", url, "bin/large"]) == 0
    assert capsys.readouterr().out.split() == ["-r--r--r--", "1500001", "large"]
    assert run(["ls", "-R", url]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == ["bin", "bin/alias", "bin/large", "bin/tool"]


@pytest.mark.parametrize(
    "form", ["{url}/{hash}.narinfo", "{url}/{hash}.ls", "{url}/{path}", "{url}/{path}/", "{url}/nix/store/{path}"]
)
def test_ways_to_name_a_path(vectors: FolderServer, capsys: pytest.CaptureFixture[str], form: str) -> None:
    what = form.format(url=vectors.url, hash=PROGRAM[:32], path=PROGRAM)
    assert run(["ls", what]) == 0
    assert capsys.readouterr().out == "bin\nlib\n"


def test_a_cache_below_a_prefix_and_one_from_settings(
    vectors: FolderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (vectors.folder.parent / "deep").mkdir()
    vectors.folder.rename(vectors.folder.parent / "deep" / "main")
    vectors.folder = vectors.folder.parent / "deep"
    link = tmp_path / "result"
    link.symlink_to(f"/nix/store/{PROGRAM}")  # it leads nowhere on this machine
    for what in (f"/nix/store/{PROGRAM}", PROGRAM, str(link), f"{tmp_path}/x/../result/"):
        assert run(["ls", "--from", f"{vectors.url}/main/", f"{what}/bin"]) == 0
        assert capsys.readouterr().out == "program\n"
    monkeypatch.setenv("CACHESRV_URL", f"{vectors.url}/main")
    assert run(["ls", f"/nix/store/{PROGRAM}/bin"]) == 0
    assert capsys.readouterr().out == "program\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{url}/" + PROGRAM, "bin/none"], (1, f"there is no none in /nix/store/{PROGRAM}/bin")),
        (["{url}/" + PROGRAM + "/bin/program/x"], (1, f"/nix/store/{PROGRAM}/bin/program is a file")),
        (["{url}/" + NONE + "-x"], (1, f"there is no path {NONE}-… in {{url}}")),
        (["{url}/" + PROGRAM[:32] + "-other"], (1, f"it has {PROGRAM}")),
        (["{url}"], (2, "names no store path")),
        (["{url}/main"], (2, "names no store path")),
        (["{url}/" + PROGRAM + "?x"], (1, f"it has {PROGRAM}")),
        (["{url}?x/" + PROGRAM], (2, "more than host and path")),
        (["ftp://x/" + PROGRAM], (2, "http://")),
        (["http://[/" + PROGRAM], (2, "not a URL")),
        (["http://x:99999/" + PROGRAM], (2, "not a URL")),
        (["--from", "http://x/my cache", PROGRAM], (2, "not the URL of a cache: '/my cache' has to be written with %")),
        (["--from", "nonsense", PROGRAM], (2, "not the URL of a cache: nonsense: it has to begin with http://")),
        (["http://u:secret@x/" + PROGRAM], (2, "netrc")),
        (["/nix/store/" + PROGRAM], (1, "is not in the store here; which cache?")),
        (["/etc/passwd"], (1, "not in the store")),
        (["./none"], (1, "leads nowhere")),
        (["--from", "{url}", "--trusted-key", "x", PROGRAM], (2, "--trusted-key")),
        (["http://127.0.0.1:1/" + PROGRAM], (1, "cannot be reached")),
    ],
)
def test_what_cannot_be_listed(
    vectors: FolderServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: tuple[int, str],
) -> None:
    monkeypatch.setattr("cachesrv.push.remote.PATIENCE", Backoff(attempts=1))
    status, message = expected
    assert run(["ls", *(argument.replace("{url}", vectors.url) for argument in arguments)]) == status
    said = capsys.readouterr()
    assert message.replace("{url}", vectors.url) in said.err
    assert said.err.count("\n") == 1
    assert "secret" not in said.err
    assert said.out == ""


FILES = ("bin/large", "bin/tool", "etc/conf", "etc/nothing", "zz/last")


def test_cat_prints_every_file(sample: Sample, served: FolderServer, cat: Cat) -> None:
    for name in FILES:
        assert cat(f"{served.url}/{sample.path}/{name}") == sample.read(name)
        assert cat("--verify", f"{served.url}/{sample.path}/{name}") == sample.read(name)
    assert cat(f"{served.url}/{sample.path}/bin/alias") == sample.read("bin/tool")
    assert cat(f"{served.url}/{sample.path}/etc/with%20blank%1b%5b31m%3f") == b"odd"


def test_cat_without_a_listing_or_ranges(sample: Sample, served: FolderServer, cat: Cat) -> None:
    """With a listing and without ranges; then without either."""
    served.ranges = False
    for name in FILES:
        assert cat(f"{served.url}/{sample.path}/{name}") == sample.read(name)
    (served.folder / f"{sample.path.hash_part}.ls").unlink()
    for name in (*FILES, "bin/alias"):
        assert cat(f"{served.url}/{sample.path}/{name}") == sample.read(name)


@pytest.mark.parametrize("served", ["none", "seekable"], indirect=True)
def test_cat_reads_from_the_middle(sample: Sample, served: FolderServer, cat: Cat) -> None:
    assert cat(f"{served.url}/{sample.path}/etc/conf") == sample.read("etc/conf")
    assert 0 < served.nar_bytes < 600_000
    served.nar_bytes = 0
    assert cat(f"{served.url}/{sample.path}/zz/last") == sample.read("zz/last")
    assert 2_000_003 <= served.nar_bytes < 2_800_000


@pytest.mark.parametrize("served", ["xz", "zstd"], indirect=True)
def test_cat_stops_when_the_file_is_there(sample: Sample, served: FolderServer, cat: Cat) -> None:
    served.folder = served.folder.rename(served.folder.parent / "moved")
    info = narinfo.parse((served.folder / f"{sample.path.hash_part}.narinfo").read_bytes())
    file = served.folder / info.url
    file.write_bytes(file.read_bytes()[:1_800_000])  # what follows is not missed
    assert cat(f"{served.url}/{sample.path}/bin/large") == sample.read("bin/large")
    assert cat(f"{served.url}/{sample.path}/zz/last", status=1) != sample.read("zz/last")


@pytest.mark.parametrize("listing_there", [True, False])
def test_what_cannot_be_printed(
    sample: Sample, tmp_path: Path, cat: Cat, capsys: pytest.CaptureFixture[str], *, listing_there: bool
) -> None:
    folder = Path(shutil.copytree(sample.caches["zstd"], tmp_path / "cache"))
    if not listing_there:
        (folder / f"{sample.path.hash_part}.ls").unlink()
    with serving(FolderServer(folder)) as server:
        for member, said in (
            ("", "is a directory: `cachesrv ls`"),
            ("etc/empty", "etc/empty is a directory"),
            ("etc/none", "there is no none in"),
            ("etc/out", "etc/out is a link to /elsewhere/x: ask for that"),
        ):
            assert cat(f"{server.url}/{sample.path}/{member}", status=1) == b""
            assert said in capsys.readouterr().err


def test_a_small_nar_that_is_wrong_is_not_printed(
    vectors: FolderServer, cat: Cat, capsys: pytest.CaptureFixture[str]
) -> None:
    info = narinfo.parse((vectors.folder / f"{PROGRAM[:32]}.narinfo").read_bytes())
    file = vectors.folder / info.url
    right = file.read_bytes()
    what = f"{vectors.url}/{PROGRAM}/bin/program"
    assert cat(what) in right
    for wrong in (right.replace(b"#!", b"!#"), right[:-8], right + bytes(8), b"", b"nonsense", right * 2):
        file.write_bytes(wrong)
        assert cat(what, status=1) == b""
        assert cat("--verify", what, status=1) == b""
    assert run(["ls", "--verify", f"{vectors.url}/{PROGRAM}"]) == 1
    assert capsys.readouterr().out == ""


def test_a_large_nar_that_is_wrong_is_not_printed_when_verified(
    sample: Sample, served: FolderServer, cat: Cat, capsys: pytest.CaptureFixture[str]
) -> None:
    change(served.folder, sample.path, nar_hash=Hash("sha256", sha256(b"other").digest()))
    assert cat("--verify", f"{served.url}/{sample.path}/etc/conf", status=1) == b""
    assert "is not what its narinfo says" in capsys.readouterr().err


@pytest.mark.parametrize("served", ["none", "seekable", "xz"], indirect=True)
def test_a_listing_that_is_wrong_does_no_harm(sample: Sample, served: FolderServer, cat: Cat) -> None:
    """Wrong places, a file where there is none, nonsense: the NAR itself says what is so."""
    file = served.folder / f"{sample.path.hash_part}.ls"
    right = listing.parse(file.read_bytes())
    conf = listing.find(right, "etc/conf")
    assert isinstance(conf, listing.Regular)
    what = f"{served.url}/{sample.path}/etc/conf"
    for size, offset in (
        (conf.size, conf.nar_offset + 8),
        (conf.size + 1, conf.nar_offset),
        (conf.size, 8),
        (2**62, conf.nar_offset),
        (conf.size, 2**62),
        (0, 0),
    ):
        wrong = listing.Directory({"etc": listing.Directory({"conf": listing.Regular(size, nar_offset=offset)})})
        file.write_bytes(listing.render(wrong))
        assert cat(what) == b"contents\n"
    file.write_bytes(listing.render(listing.Directory({"etc": listing.Symlink("zz")})))
    assert cat(f"{served.url}/{sample.path}/etc/last", status=1) == b""
    for nonsense in (b"", b"{}", b"[" * 100_000):
        file.write_bytes(nonsense)
        assert cat(what) == b"contents\n"


@pytest.mark.parametrize("served", ["seekable"], indirect=True)
def test_a_seek_table_that_is_wrong_does_no_harm(sample: Sample, served: FolderServer, cat: Cat) -> None:
    info = narinfo.parse((served.folder / f"{sample.path.hash_part}.narinfo").read_bytes())
    file = served.folder / info.url
    right = file.read_bytes()
    for wrong in (
        right[:-9] + (2**20 - 1).to_bytes(4, "little") + right[-5:],
        right[:-9] + (1).to_bytes(4, "little") + right[-5:],
        right[:-1] + b"\0",
        right[:-20] + bytes([right[-20] ^ 1]) + right[-19:],
    ):
        file.write_bytes(wrong)
        assert cat(f"{served.url}/{sample.path}/bin/tool") == sample.read("bin/tool")


def test_transfers_that_break_go_on(
    sample: Sample, served: FolderServer, cat: Cat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ranges from where they were, without from the beginning, over what was there already."""
    monkeypatch.setattr("cachesrv.push.remote.PATIENCE", Backoff(attempts=4, first=0.01))
    served.breaks_after = 700_000
    for name in ("bin/large", "zz/last"):
        assert cat(f"{served.url}/{sample.path}/{name}") == sample.read(name)
        assert cat("--verify", f"{served.url}/{sample.path}/{name}") == sample.read(name)
    served.ranges = False
    before = len(served.asked)
    assert cat("--verify", f"{served.url}/{sample.path}/etc/conf", status=1) == b""
    assert len(served.asked) - before < 10


def test_a_server_that_is_busy_is_asked_again(
    vectors: FolderServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachesrv.push.remote.PATIENCE", Backoff(attempts=4, first=0.01))
    vectors.failures = 2
    assert run(["ls", f"{vectors.url}/{PROGRAM}"]) == 0
    vectors.failures = 1000
    assert run(["ls", f"{vectors.url}/{PROGRAM}"]) == 1
    assert "503" in capsys.readouterr().err


def test_a_token_goes_to_its_server_only(
    vectors: FolderServer, tmp_path: Path, cat: Cat, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors.token = "csrv_geheim"
    token_file = tmp_path / "token"
    token_file.write_text("csrv_geheim\n")
    what = f"{vectors.url}/{PROGRAM}/bin/program"
    assert cat(what, status=1) == b""
    assert "--token-file" in capsys.readouterr().err
    with serving(FolderServer(vectors.folder)) as elsewhere:
        vectors.redirects_nars_to = elsewhere.url
        assert cat("--token-file", str(token_file), what).startswith(b"#!")
        assert elsewhere.tokens == [None]
        vectors.redirects_nars_to = None
        change(
            vectors.folder, StorePath.parse(PROGRAM), url=f"{elsewhere.url}/{elsewhere.asked[0].removeprefix('GET ')}"
        )
        assert cat("--token-file", str(token_file), what).startswith(b"#!")
        assert elsewhere.tokens == [None, None]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://[::1", "http://h:99999/x", "https:///x"])
def test_nars_that_are_nowhere(vectors: FolderServer, cat: Cat, capsys: pytest.CaptureFixture[str], url: str) -> None:
    change(vectors.folder, StorePath.parse(PROGRAM), url=url)
    assert cat(f"{vectors.url}/{PROGRAM}/bin/program", status=1) == b""
    assert "cannot be fetched" in capsys.readouterr().err


def test_metadata_may_be_compressed(vectors: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (f"{PROGRAM[:32]}.narinfo", f"{PROGRAM[:32]}.ls"):
        (vectors.folder / name).write_bytes(brotli.compress((vectors.folder / name).read_bytes()))
        vectors.encodings[name] = "br"
    assert run(["ls", f"{vectors.url}/{PROGRAM}"]) == 0
    assert capsys.readouterr().out == "bin\nlib\n"
    (vectors.folder / f"{PROGRAM[:32]}.narinfo").write_bytes(brotli.compress(bytes(50_000_000), quality=1))
    assert run(["ls", f"{vectors.url}/{PROGRAM}"]) == 1
    assert "bytes after decompression" in capsys.readouterr().err


def test_signatures(vectors: FolderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {
        name: (VECTORS / "keys" / f"{name}.public").read_text().strip() for name in ("cache.test-1", "cache.test-2")
    }
    what = f"{vectors.url}/{PROGRAM}"
    stranger = f"other-1:{keys['cache.test-1'].split(':')[1]}"
    impostor = f"cache.test-2:{keys['cache.test-1'].split(':')[1]}"
    assert run(["ls", what, "--trusted-key", keys["cache.test-2"]]) == 0
    assert run(["ls", what, "--trusted-key", stranger, "--trusted-key", keys["cache.test-2"]]) == 0
    for key in (stranger, impostor):
        capsys.readouterr()
        assert run(["ls", what, "--trusted-key", key]) == 1
        assert "is not signed by" in capsys.readouterr().err
    (tmp_path / "nix.conf").write_text(f"extra-trusted-public-keys = {keys['cache.test-2']} nonsense\n")
    assert run(["ls", what]) == 0
    change(vectors.folder, StorePath.parse(PROGRAM), references=())
    assert run(["ls", what]) == 1
    assert "the signature of" in capsys.readouterr().err
    (tmp_path / "nix.conf").unlink()
    assert run(["ls", what]) == 0


@pytest.mark.parametrize("data", [b"", b"nonsense\n", b"StorePath: x\n", b"\xff" * 100])
def test_a_narinfo_that_is_none(vectors: FolderServer, capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    (vectors.folder / f"{PROGRAM[:32]}.narinfo").write_bytes(data)
    assert run(["ls", f"{vectors.url}/{PROGRAM}"]) == 1
    assert "narinfo" in capsys.readouterr().err


def test_a_narinfo_of_another_path(vectors: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    other = next(file for file in vectors.folder.glob("*.narinfo") if file.stem != PROGRAM[:32])
    shutil.copy(other, vectors.folder / f"{PROGRAM[:32]}.narinfo")
    assert run(["ls", f"{vectors.url}/{PROGRAM}"]) == 1
    assert other.stem in capsys.readouterr().err


@pytest.fixture
def here(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sample's store path in the store here, in full."""
    monkeypatch.setenv("NIX_REMOTE", str(sample.root))
    return sample.path.full("/nix/store")


def test_cat_from_the_store_here(
    sample: Sample, here: str, tmp_path: Path, cat: Cat, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "result"
    link.symlink_to(here)
    for name in (*FILES, "bin/alias"):
        assert cat(f"{here}/{name}") == sample.read(name)
        assert cat(f"{link}/{name}") == sample.read(name)
    inside = tmp_path / "inside"
    inside.symlink_to(sample.root / "nix" / "store" / str(sample.path) / "etc")
    assert cat(f"{inside}/conf") == b"contents\n"
    for name, said in (
        ("etc", f"{here}/etc is a directory"),
        ("etc/none/x", f"there is no none in {here}/etc"),
        ("bin/tool/x", f"{here}/bin/tool is a file, there is no x in it"),
        ("etc/out", f"{here}/etc/out leads out of the store, to /elsewhere/x"),
    ):
        capsys.readouterr()
        assert cat(f"{here}/{name}", status=1) == b""
        assert said in capsys.readouterr().err


def test_ls_from_the_store_here(here: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ls", here, "bin"]) == 0
    assert capsys.readouterr().out == "alias\nlarge\ntool\n"
    assert run(["ls", "-l", f"{here}/bin/alias"]) == 0
    assert capsys.readouterr().out.split() == ["lrwxrwxrwx", "0", "alias", "->", "tool"]
    assert run(["ls", f"{here}/none"]) == 1
    assert f"there is no none in {here}" in capsys.readouterr().err


def test_from_passes_over_the_store_here(here: str, vectors: FolderServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ls", "--from", vectors.url, here]) == 1
    assert vectors.url in capsys.readouterr().err


def test_names_that_are_not_utf8(sample: Sample, here: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    folder = root / "nix" / "store" / f"{NONE}-odd"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"a\xff")).write_text("odd")
    os.environ["NIX_REMOTE"] = str(root)
    assert run(["ls", f"/nix/store/{NONE}-odd"]) == 0
    assert capsys.readouterr().out == "a\\udcff\n"
    assert run(["ls", "--json", f"/nix/store/{NONE}-odd"]) == 0
    assert "a\\udcff" in capsys.readouterr().out


@pytest.mark.parametrize("raw", [False, True])
def test_names_that_are_not_utf8_in_a_cache(
    tmp_path: Path, raw: bool, cat: Cat, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a listing, and with one of Nix 2.8, which is no JSON."""
    tree, folder = tmp_path / "tree", tmp_path / "cache"
    inside = b"d\xff/f\xc3"
    (tree / os.fsdecode(inside)).parent.mkdir(parents=True)
    (tree / os.fsdecode(inside)).write_text("odd")
    (tree / "link").symlink_to(os.fsdecode(inside))
    nar = b"".join(dump(tree))
    path = StorePath(NONE, "odd")
    info = NarInfo(path, "/nix/store", "nar/odd.nar", "none", None, None, Hash.of("sha256", nar), len(nar))
    (folder / "nar").mkdir(parents=True)
    (folder / info.url).write_bytes(nar)
    (folder / f"{NONE}.narinfo").write_bytes(narinfo.render(info))
    if raw:
        (folder / f"{NONE}.ls").write_bytes(
            b'{"root":{"entries":{"d\xff":{"entries":{},"type":"directory"}}},"version":1}'
        )
    with serving(FolderServer(folder)) as server:
        url = f"{server.url}/{path}"
        assert run(["ls", "-lR", url]) == 0
        shown = [line.split()[2:] for line in capsys.readouterr().out.splitlines()]
        assert shown == [["d\\udcff"], ["d\\udcff/f\\udcc3"], ["link", "->", "d\\udcff/f\\udcc3"]]
        assert listed(capsys, url)["entries"].keys() == {os.fsdecode(b"d\xff"), "link"}
        assert cat(f"{url}/{os.fsdecode(inside)}") == b"odd"
        assert cat(f"{url}/link") == b"odd"


def test_what_was_pushed_to_a_server_of_ours(
    sample: Sample, tmp_path: Path, cat: Cat, capsys: pytest.CaptureFixture[str]
) -> None:
    """A private one, whose token is found where push finds it."""
    config = '[[cache]]\nname = "main"\npublic = false\n'
    server = Server(tmp_path / "server", config=config).start()
    try:
        command = [sys.executable, "-m", "cachesrv", "push", "--to", server.main, sample.path.full("/nix/store")]
        environ = sample.environ | {"CACHESRV_DATA_DIR": str(server.data_dir)}
        subprocess.run(command, env=environ, check=True, capture_output=True)
        what = ("--token-file", str(server.token_file), f"{server.main}/{sample.path}")
        for name in FILES:
            assert cat(*what[:-1], f"{what[-1]}/{name}") == sample.read(name)
        assert run(["ls", "--trusted-key", server.public_key, *what, "bin"]) == 0
        assert capsys.readouterr().out == "alias\nlarge\ntool\n"
    finally:
        server.dispose()


def run_in_shell(command: str, environ: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    program = f"{sys.executable} -m cachesrv"
    return subprocess.run(
        ["bash", "-c", command.replace("cachesrv", program)], env=environ, capture_output=True, check=False
    )


def test_a_reader_that_goes_away_is_no_error(sample: Sample, served: FolderServer) -> None:
    for what in (f"cat {served.url}/{sample.path}/zz/last", f"cat {sample.path.full('/nix/store')}/zz/last"):
        done = run_in_shell(f"cachesrv {what} | head -c 10", sample.environ)
        assert (done.stdout, done.stderr) == (sample.read("zz/last")[:10], b"")


def test_memory_is_bounded(sample: Sample, tmp_path: Path) -> None:
    """A NAR that grows a thousandfold, and a file of which all is wanted."""
    size = 192 * 1024 * 1024
    tree = tmp_path / "tree"
    tree.write_bytes(b"")
    os.truncate(tree, size)
    nar = subprocess.run(["nix-store", "--dump", str(tree)], check=True, capture_output=True).stdout
    cache = tmp_path / "cache"
    (cache / "nar").mkdir(parents=True)
    data = b"".join(compress_zstd([nar]))
    (cache / "nar" / "x").write_bytes(data)
    path = StorePath(NONE, "zeros")
    info = NarInfo(
        path, "/nix/store", "nar/x", "zstd", Hash.of("sha256", data), len(data), Hash.of("sha256", nar), len(nar)
    )
    (cache / f"{NONE}.narinfo").write_bytes(narinfo.render(info))
    del nar
    with serving(FolderServer(cache)) as server:
        command = [sys.executable, "-m", "cachesrv", "cat", f"{server.url}/{path}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=sample.environ) as process:
            assert process.stdout is not None
            almost = size - 1024 * 1024  # what is left does not fit into a pipe: it is still running
            assert sum(len(process.stdout.read(65536)) for _ in range(almost // 65536)) == almost
            assert peak_memory(process.pid) < 120 * 1024 * 1024
            assert len(process.stdout.read()) == size - almost
    assert process.returncode == 0


@pytest.mark.parametrize("command", ["ls", "cat"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"Examples:\n +cachesrv {command} ", said)
