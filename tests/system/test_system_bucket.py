"""A bucket that somebody else fills, in the layout of `nix copy --to s3://…`, served as it lies there."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import brotli  # type: ignore[import-untyped]  # it has no types
import pytest

from tests.samples import Sample
from tests.system.nix import CHAIN
from tests.system.push import push
from tests.system.server import CACHESRV, until
from tests.system.stored import Bucket

if TYPE_CHECKING:
    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, MakeClient, StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server


@pytest.fixture(params=["redirect", "proxy", "all-of-a-bucket"])
def bucket_of_others(
    request: pytest.FixtureRequest, make_bucket: MakeBucket, gateway: Gateway, tmp_path: Path
) -> Bucket:
    """Nix itself writes to no folder of a bucket."""
    if request.param == "all-of-a-bucket":
        return Bucket(gateway, gateway.make_bucket(), "", tmp_path)
    return make_bucket(request.param)


@pytest.fixture
def cache(bucket_of_others: Bucket, builder: Nix, make_server: StartServer) -> Server:
    environment = {
        "CACHESRV_SERVER__STORE_DIR": builder.store_dir,
        "CACHESRV_CACHE__0__AUTHORITY": "bucket",
        "CACHESRV_LOOKUP__NEGATIVE_TTL": "1",
        "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "1 GiB",
    }
    return make_server(stored=bucket_of_others, environment=environment).start()


@pytest.fixture
def public_key(builder: Nix) -> str:
    """That of the one who fills the bucket."""
    secret = builder.folder / "secret"
    secret.write_text(builder.run("nix", "key", "generate-secret", "--key-name", "builder-1"))
    builder.configure(secret_key_files=str(secret))
    return builder.run("nix", "key", "convert-secret-to-public", text=secret.read_text())


def write(builder: Nix, *paths: str, compression: str = "xz") -> Path:
    """Have Nix write paths as it does into a bucket."""
    folder = builder.folder / f"plain-{compression}"
    builder.run("nix", "copy", "--to", f"file://{folder}?compression={compression}&write-nar-listing=true", *paths)
    return folder


def hash_part(path: str) -> str:
    return Path(path).name[:32]


def test_what_lies_there_is_served(builder: Nix, cache: Server, public_key: str, make_client: MakeClient) -> None:
    """Nothing is pushed, reindexed or written; and it is served by a server that was started again."""
    program, plain = builder.build(CHAIN, "program")[0], builder.add("plain", "not compressed")
    folders = [write(builder, program), write(builder, plain, compression="none")]
    for folder in folders:
        cache.stored.fill(folder)
    before = cache.stored.state()
    for _ in range(2):
        client = make_client(cache)
        client.configure(trusted_public_keys=public_key)
        client.run("nix-store", "--realise", program, plain)
        assert client.hashes(program, plain) == builder.hashes(program, plain)
        cache.stop()
        cache.start()
    for folder in folders:
        for file in [*folder.glob("*.narinfo"), *folder.glob("*.ls"), *folder.glob("nar/*")]:
            assert cache.client().get(f"/main/{file.relative_to(folder)}").body == file.read_bytes()
    assert cache.stored.state() == before


def test_what_comes_later_is_found_when_its_absence_has_ended(builder: Nix, cache: Server) -> None:
    path = builder.add("late", "late")
    url = f"/main/{hash_part(path)}.narinfo"
    assert cache.client().get(url).status == 404
    cache.stored.fill(write(builder, path))
    until(lambda: cache.client().get(url).status == 200, "what lies in the bucket is not found")


def test_what_is_pushed_lies_beside_it(builder: Nix, cache: Server, client: Nix, public_key: str) -> None:
    """References may lie there since before; and the push is told what is there."""
    program, tool = builder.build(CHAIN, "program", "tool")
    cache.stored.fill(write(builder, tool))
    assert cache.client().get(f"/main/{hash_part(tool)}.narinfo").status == 200
    push(builder, cache, program)
    client.configure(trusted_public_keys=f"{public_key} {cache.public_key}")
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


def test_metadata_that_hydra_compressed(cache: Server, bucket_of_others: Bucket) -> None:
    """Narinfos, listings and logs may have a Content-Encoding there. Not all clients would understand it."""
    sample = Sample("sample", b"some bytes")
    texts = {
        f"{sample.path.hash_part}.narinfo": sample.narinfo(store_dir=cache.environment["CACHESRV_SERVER__STORE_DIR"]),
        f"{sample.path.hash_part}.ls": b'{"version":1,"root":{"type":"regular","size":10}}',
        f"log/{'0' * 32}-sample.drv": b"a line of a log\n" * 1000,
    }
    bucket_of_others.write(f"nar/{sample.nar_name}", sample.file)
    for name, text in texts.items():
        bucket_of_others.write(name, brotli.compress(text), encoding="br")
    for name, text in texts.items():
        answer = cache.client().get(f"/main/{name}", Accept_Encoding="br")
        assert (answer.status, answer.body) == (200, text)
        assert "content-encoding" not in answer.headers
        assert cache.client().head(f"/main/{name}").headers["content-length"] == str(len(text))


def run(cache: Server, *command: str) -> None:
    done = subprocess.run(
        [*CACHESRV, *command, "--data-dir", str(cache.data_dir)],
        check=False,
        env=cache.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_it_is_taken_into_the_catalog_and_found_whole(builder: Nix, cache: Server) -> None:
    program, tool = builder.build(CHAIN, "program", "tool")
    cache.stored.fill(write(builder, tool))
    push(builder, cache, program)
    run(cache, "reindex")
    run(cache, "verify", "--contents")
    published = {hash_part for (hash_part,) in cache.query("SELECT hash_part FROM paths")}
    assert {hash_part(path) for path in (program, tool)} <= published


def test_a_bucket_without_folders_of_our_own(
    builder: Nix, make_server: StartServer, gateway: Gateway, tmp_path: Path
) -> None:
    """Nobody else writes to it: what is not needed goes, objects and all."""
    environment = {
        "CACHESRV_SERVER__STORE_DIR": builder.store_dir,
        "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "1 GiB",
    }
    cache = make_server(stored=Bucket(gateway, gateway.make_bucket(), "", tmp_path), environment=environment).start()
    builder.log_in(cache.token)
    program, alone = builder.build(CHAIN, "program")[0], builder.add("alone", "alone")
    push(builder, cache, alone)
    before = cache.stored.names("nar/")
    push(builder, cache, program)
    run(cache, "delete", alone, "--now")
    names = cache.stored.names()
    assert f"{hash_part(program)}.narinfo" in names
    assert not names & {f"{hash_part(alone)}.narinfo", *before}
    assert cache.client().get(f"/main/{hash_part(alone)}.narinfo").status == 404
    run(cache, "verify", "--contents")
