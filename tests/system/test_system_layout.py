"""What lies below `objects/main` is a binary cache by itself, and a binary cache can be put there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.system.conftest import both_storages, both_ways_and_storages
from tests.system.nix import CHAIN
from tests.system.push import by_copy, push
from tests.system.server import CACHESRV
from tests.system.stored import Folder

if TYPE_CHECKING:
    from tests.system.conftest import MakeClient
    from tests.system.nix import Nix
    from tests.system.push import Fill
    from tests.system.server import Server


def reindex(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CACHESRV, "reindex", "--data-dir", str(server.data_dir), *arguments],
        check=False,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@both_ways_and_storages
def test_the_objects_are_a_cache_without_a_server(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    (program,) = builder.build(CHAIN, "program")
    fill(builder, cache, program)
    cache.stop()
    objects = cache.stored.copy()
    before = Folder(objects).state()
    client.run("nix", "copy", "--from", f"file://{objects}", program)
    assert client.hashes(program) == builder.hashes(program)
    client.run("nix", "store", "verify", "-r", "--store", f"file://{objects}", "--sigs-needed", "1", program)
    assert Folder(objects).state() == before, "reading made the client write what was missing"


@both_storages
def test_the_objects_say_what_store_they_are_for(builder: Nix, cache: Server) -> None:
    push(builder, cache, *builder.build(CHAIN, "library"))
    info = cache.stored.read("nix-cache-info")
    assert f"StoreDir: {builder.store_dir}\n".encode() in info
    assert cache.client().get("/main/nix-cache-info").body == info


def test_a_folder_that_nix_wrote_is_served(builder: Nix, cache: Server, make_client: MakeClient) -> None:
    """After a reindex, while the server runs and after it was started again; with signatures as they were."""
    secret = builder.folder / "secret"
    secret.write_text(builder.run("nix", "key", "generate-secret", "--key-name", "builder-1"))
    public = builder.run("nix", "key", "convert-secret-to-public", text=secret.read_text())
    builder.configure(secret_key_files=str(secret))
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    folder = builder.folder / "plain"
    builder.run("nix", "copy", "--to", f"file://{folder}?compression=xz", program)
    assert cache.client().get(f"/main/{_hash_part(program)}.narinfo").status == 404
    shutil.copytree(folder, cache.objects, dirs_exist_ok=True)
    done = reindex(cache)
    assert (done.returncode, done.stdout) == (0, "main: 3 paths served\n")
    for _ in range(2):
        client = make_client(cache)
        client.configure(trusted_public_keys=public)
        client.run("nix", "copy", "--from", cache.main, program)
        assert client.hashes(program) == builder.hashes(program)
        cache.stop()
        cache.start()
    for path in (program, tool, library):
        served = cache.client().get(f"/main/{_hash_part(path)}.narinfo").body
        assert served == (folder / f"{_hash_part(path)}.narinfo").read_bytes()
    # and it goes on as any cache: what is there is not sent, and a push signs it
    assert push(builder, cache, program)["present"] == 3


def test_catalog_and_index_can_be_rebuilt(builder: Nix, cache: Server, client: Nix) -> None:
    (program,) = builder.build(CHAIN, "program")
    push(builder, cache, program)
    before = cache.client().get(f"/main/{_hash_part(program)}.narinfo").body
    cache.stop()
    for file in cache.data_dir.glob("catalog.sqlite*"):
        file.unlink()
    shutil.rmtree(cache.data_dir / "index")
    assert reindex(cache).returncode == 0
    cache.start()
    assert cache.client().get(f"/main/{_hash_part(program)}.narinfo").body == before
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


@both_storages
def test_an_index_that_is_lost_costs_nothing_but_time(builder: Nix, cache: Server, client: Nix) -> None:
    (program,) = builder.build(CHAIN, "program")
    push(builder, cache, program)
    cache.stop()
    shutil.rmtree(cache.data_dir / "index")
    cache.start()
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


def test_what_cannot_be_served_is_named_and_left_out(builder: Nix, cache: Server) -> None:
    """A NAR that is gone takes with it all that needs it; garbage is no reason to stop."""
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    folder = builder.folder / "plain"
    builder.run("nix", "copy", "--to", f"file://{folder}?compression=none", program)
    url = (folder / f"{_hash_part(tool)}.narinfo").read_text().partition("URL: ")[2].partition("\n")[0]
    (folder / url).unlink()
    (folder / f"{'0' * 32}.narinfo").write_text("garbage\n")
    shutil.copytree(folder, cache.objects, dirs_exist_ok=True)
    done = reindex(cache)
    assert done.returncode == 3
    assert done.stdout.startswith("main: 1 path served, 3 flaws\n")
    assert f"main: {_hash_part(tool)}: its NAR {url} is not there (missing-nar)" in done.stdout
    assert f"main: {_hash_part(program)}: it refers to {_hash_part(tool)}" in done.stdout
    assert f"main: {'0' * 32}: " in done.stdout
    assert "\n  1 missing-nar: " in done.stdout
    statuses = [cache.client().get(f"/main/{_hash_part(path)}.narinfo").status for path in (program, tool, library)]
    assert statuses == [404, 404, 200]
    # a push mends it
    push(builder, cache, program)
    builder.forget()
    assert builder.hashes(program, store=cache.main) == builder.hashes(program)


@both_storages
def test_a_push_completes_what_lies_there_unserved(builder: Nix, cache: Server, client: Nix) -> None:
    """Narinfos and NARs in storage that the catalog does not know, such as a crash or somebody else leaves behind."""
    (program,) = builder.build(CHAIN, "program")
    folder = builder.folder / "plain"
    builder.run("nix", "copy", "--to", f"file://{folder}?compression=zstd", program)
    cache.stored.fill(folder)
    by_copy(builder, cache, program)
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


def _hash_part(path: str) -> str:
    return Path(path).name[:32]
