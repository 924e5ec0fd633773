"""The main job: what one machine builds, another one gets, by way of the cache and with nothing but its key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.system.conftest import both_storages, both_ways_and_storages, every_storage
from tests.system.nix import CHAIN
from tests.system.push import both_ways, by_copy, push

if TYPE_CHECKING:
    from tests.system.conftest import MakeClient
    from tests.system.nix import Nix
    from tests.system.push import Fill
    from tests.system.server import Server


@every_storage
@both_ways
def test_a_closure_is_copied_unchanged(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    (program,) = builder.build(CHAIN, "program")
    fill(builder, cache, program)
    client.run("nix", "copy", "--from", cache.main, program)
    built = builder.hashes(program)
    assert len(built) == 3
    assert client.hashes(program) == built
    client.run("nix", "store", "verify", "-r", "--sigs-needed", "1", program)


@both_ways_and_storages
def test_a_closure_is_substituted_and_not_built(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    (program,) = builder.build(CHAIN, "program")
    fill(builder, cache, program)
    client.run("nix-store", "--realise", program)
    assert client.hashes(program) == builder.hashes(program)
    # and the same by evaluation: this machine may not build (max-jobs is 0)
    assert client.build(CHAIN, "tool", "library") == builder.build(CHAIN, "tool", "library")


def test_a_machine_that_may_not_build_fails_without_the_cache(client: Nix) -> None:
    """That the tests above show what they say: nothing but substitution helps."""
    with pytest.raises(AssertionError, match="max-jobs"):
        client.build(CHAIN, "library")


@both_ways_and_storages
def test_signatures_are_required_and_given(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    (program,) = builder.build(CHAIN, "program")
    fill(builder, cache, program)
    stranger = "main-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    client.configure(trusted_public_keys=stranger)
    refused = client.attempt("nix", "copy", "--from", cache.main, program)
    assert "lacks a valid signature" in refused.stderr
    client.configure(trusted_public_keys=cache.public_key)
    client.run("nix", "copy", "--from", cache.main, program)


@both_ways_and_storages
def test_the_cache_can_be_inspected(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    fill(builder, cache, program)
    assert client.hashes(program, store=cache.main) == builder.hashes(program)
    client.run("nix", "store", "verify", "-r", "--store", cache.main, "--sigs-needed", "1", program)
    listing = client.run("nix", "store", "ls", "-R", "--store", cache.main, library).splitlines()
    assert sorted(listing) == ["./lib", "./lib/library", "./lib/link"]
    assert client.run("nix", "store", "cat", "--store", cache.main, f"{library}/lib/library") == "some text"
    assert client.run("nix", "store", "cat", "--store", cache.main, f"{tool}/bin/tool") == f"{library} {tool}"
    client.run("nix", "store", "ping", "--store", cache.main)


@both_storages
def test_what_is_there_already_is_not_sent_again(builder: Nix, cache: Server) -> None:
    program, tool = builder.build(CHAIN, "program", "tool")
    first = push(builder, cache, tool)
    assert (first["paths"], first["uploaded"], first["present"]) == (2, 2, 0)
    second = push(builder, cache, program)
    assert (second["paths"], second["uploaded"], second["present"]) == (3, 1, 2)
    before = cache.snapshot()
    third = push(builder, cache, program)
    assert (third["uploaded"], third["sent_bytes"]) == (0, 0)
    builder.forget()
    by_copy(builder, cache, program)
    assert cache.snapshot() == before


@every_storage
def test_build_logs(builder: Nix, cache: Server, client: Nix) -> None:
    (library,) = builder.build(CHAIN, "library")
    by_copy(builder, cache, library)
    builder.run("nix", "store", "copy-log", "--to", cache.main, library)
    assert client.run("nix", "log", "--store", cache.main, library) == "building library"


@every_storage
def test_every_compression_of_nix(builder: Nix, cache: Server, client: Nix) -> None:
    for compression in ("xz", "zstd", "none", "gzip", "bzip2", "br"):
        path = builder.add(compression, f"some text for {compression}")
        builder.run("nix", "copy", "--to", f"{cache.main}?compression={compression}", path)
        client.run("nix", "copy", "--from", cache.main, path)
        assert client.hashes(path) == builder.hashes(path)
        hash_part = path.removeprefix(f"{builder.store_dir}/")[:32]
        narinfo = cache.client().get(f"/main/{hash_part}.narinfo").text
        assert f"\nCompression: {compression}\n" in narinfo


def test_a_cache_that_others_trust_signs_beside_them(builder: Nix, cache: Server, make_client: MakeClient) -> None:
    """Signatures that a path brings along stay, and so does ours."""
    secret = builder.folder / "secret"
    secret.write_text(builder.run("nix", "key", "generate-secret", "--key-name", "builder-1"))
    public = builder.run("nix", "key", "convert-secret-to-public", text=secret.read_text())
    (program,) = builder.build(CHAIN, "program")
    builder.run("nix", "store", "sign", "-r", "--key-file", str(secret), program)
    push(builder, cache, program)
    for trusted in (public, cache.public_key):
        client = make_client(cache)
        client.configure(trusted_public_keys=trusted)
        client.run("nix", "copy", "--from", cache.main, program)
    # a signature that comes later joins those that are there
    other = builder.folder / "other"
    other.write_text(builder.run("nix", "key", "generate-secret", "--key-name", "late-1"))
    builder.run("nix", "store", "sign", "--store", cache.main, "--key-file", str(other), program)
    builder.forget()
    (info,) = [info for path, info in builder.infos(program, store=cache.main).items() if path == program]
    assert {signature.partition(":")[0] for signature in info["signatures"]} == {"main-1", "builder-1", "late-1"}


@both_storages
def test_listings_are_those_of_nix(builder: Nix, cache: Server) -> None:
    """With or without `write-nar-listing`, after both ways of pushing: the listing is there, and is what Nix writes."""
    program, tool, library = builder.build(CHAIN, "program", "tool", "library")
    folder = builder.folder / "plain"
    builder.run("nix", "copy", "--to", f"file://{folder}?write-nar-listing=true", program)
    builder.run("nix", "copy", "--to", f"{cache.main}?write-nar-listing=true", library)
    builder.run("nix", "copy", "--to", cache.main, tool)
    push(builder, cache, program)
    for path in (program, tool, library):
        hash_part = path.removeprefix(f"{builder.store_dir}/")[:32]
        answer = cache.client().get(f"/main/{hash_part}.ls")
        assert answer.headers["content-type"] == "application/json"
        assert _without_defaults(json.loads(answer.body)) == json.loads((folder / f"{hash_part}.ls").read_text())


def _without_defaults(node: object) -> object:
    """Nix 2.8 leaves out what is false."""
    if not isinstance(node, dict):
        return node
    return {key: _without_defaults(value) for key, value in node.items() if (key, value) != ("executable", False)}
