"""What a cache holds beside plain builds: content-addressed paths, realisations, debug info, encoded metadata."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import brotli  # type: ignore[import-untyped]  # it has no types
import zstandard

from tests.system.conftest import both_storages, both_ways_and_storages
from tests.system.nix import CONTENT_ADDRESSED
from tests.system.push import attempt, by_copy, events, push

if TYPE_CHECKING:
    from tests.system.conftest import MakeNix
    from tests.system.nix import Nix
    from tests.system.push import Fill
    from tests.system.server import Server

BUILD_ID = "0123456789abcdef0123456789abcdef01234567"
WITH_DEBUG_INFO = f"""{{
    symbols = derivation {{
        name = "symbols";
        system = builtins.currentSystem;
        builder = "/bin/sh";
        args = [ "-c" ''
            PATH=/usr/bin:/bin
            mkdir -p $out/lib/debug/.build-id/{BUILD_ID[:2]}
            echo symbols > $out/lib/debug/.build-id/{BUILD_ID[:2]}/{BUILD_ID[2:]}.debug
        '' ];
    }};
}}"""


@both_ways_and_storages
def test_content_addressed_paths_need_no_signature(make_nix: MakeNix, server: Server, fill: Fill) -> None:
    """Text with references, files by flat and recursive hash: in the usual store directory, without any key."""
    source, client = make_nix(), make_nix()
    source.log_in(server.token)
    text = source.evaluate('builtins.toFile "program" "uses ${builtins.toFile "library" ""}"')
    added = source.add("added", b"\0 some bytes")
    (source.folder / "fixed").write_text("fixed")
    flat = source.run("nix-store", "--add-fixed", "sha256", "fixed")
    recursive = source.run("nix-store", "--add-fixed", "--recursive", "sha1", "fixed")
    fill(source, server, text, added, flat, recursive)
    client.run("nix", "copy", "--from", server.main, text, added, flat, recursive)
    infos = client.infos(text, added, flat, recursive)
    assert {info.get("ca", "").rpartition(":")[0] for info in infos.values()} == {
        "text:sha256",
        "fixed:r:sha256",
        "fixed:sha256",
        "fixed:r:sha1",
    }
    assert client.hashes(*infos) == source.hashes(text, added, flat, recursive)


@both_ways_and_storages
def test_content_addressed_paths_that_refer_to_themselves(builder: Nix, cache: Server, client: Nix, fill: Fill) -> None:
    (program,) = builder.build(CONTENT_ADDRESSED, "program")
    infos = builder.infos(program)
    assert any(path in info["references"] for path, info in infos.items())
    fill(builder, cache, program)
    client.configure(trusted_public_keys="")
    client.run("nix", "copy", "--from", cache.main, program)
    assert client.hashes(program) == builder.hashes(program)


@both_storages
def test_realisations_let_content_addressed_builds_be_substituted(builder: Nix, cache: Server, client: Nix) -> None:
    secret = builder.folder / "secret"
    secret.write_text(builder.run("nix", "key", "generate-secret", "--key-name", "builder-1"))
    public = builder.run("nix", "key", "convert-secret-to-public", text=secret.read_text())
    builder.configure(secret_key_files=str(secret))
    (program,) = builder.build(CONTENT_ADDRESSED, "program")
    builder.run("nix", "copy", "--to", cache.main, "--file", "default.nix", "program")
    client.configure(trusted_public_keys=public)
    assert client.build(CONTENT_ADDRESSED, "program") == [program]
    assert client.hashes(program) == builder.hashes(program)
    names = cache.stored.names("realisations/")
    assert len(names) == 2
    for name in names:
        bare = cache.client().get(f"/main/{name}")
        quoted = cache.client().get(f"/main/{name.replace('!', '%21')}")
        assert bare.body == quoted.body == cache.stored.read(name)
        assert bare.headers["content-type"] == "application/json"
        head = cache.client().head(f"/main/{name}")
        assert (head.status, head.headers["content-length"]) == (200, str(len(bare.body)))


@both_storages
def test_pushed_realisations_let_content_addressed_builds_be_substituted(
    builder: Nix, cache: Server, client: Nix
) -> None:
    """No key but the cache's own, for builds that nobody signed."""
    (program,) = builder.build(CONTENT_ADDRESSED, "program")
    push(builder, cache, program)
    assert client.build(CONTENT_ADDRESSED, "program") == [program]
    assert client.hashes(program) == builder.hashes(program)
    assert {info.get("ca", "")[:8] for info in client.infos(program, store=cache.main).values()} == {"fixed:r:"}
    events_of_second = events(attempt(builder, cache, program))
    assert [event for event in events_of_second if event["event"] == "realised"] == []
    assert events_of_second[-1]["present"] == 2


@both_storages
def test_a_path_that_came_out_once_more_is_realised_once_more(builder: Nix, cache: Server, client: Nix) -> None:
    """Another derivation with the same output: the path is in the cache, how it came to be is not."""
    other = CONTENT_ADDRESSED.replace("echo $out > $out/self", "true; echo $out > $out/self")
    (library,) = builder.build(CONTENT_ADDRESSED, "library")
    push(builder, cache, library)
    assert builder.build(other, "library") == [library]
    told = events(attempt(builder, cache, library))
    assert told[-1]["present"] == 1
    assert len([event for event in told if event["event"] == "realised"]) == 1
    assert client.build(other, "library") == [library]


@both_storages
def test_a_realisation_leads_to_a_path_that_is_there_and_stays(builder: Nix, cache: Server) -> None:
    library, program = builder.build(CONTENT_ADDRESSED, "library", "program")
    output = f"sha256:{'0' * 64}!out"
    pusher = cache.pusher
    leads_to = {"id": output, "outPath": _base_name(library), "signatures": [], "dependentRealisations": {}}
    refused = pusher.put(f"/main/realisations/{output}.doi", _json(leads_to))
    assert refused.status == 422
    assert _base_name(library) in refused.text
    push(builder, cache, program)
    assert pusher.put(f"/main/realisations/{output}.doi", _json(leads_to)).status == 204
    elsewhere = leads_to | {"outPath": _base_name(program)}
    refused = pusher.put(f"/main/realisations/{output}.doi", _json(elsewhere))
    assert refused.status == 409
    assert _base_name(library) in refused.text
    assert _base_name(program) in refused.text
    found = json.loads(pusher.get(f"/main/realisations/{output}.doi").body)
    assert [signature.partition(":")[0] for signature in found["signatures"]] == ["main-1"]
    assert found | {"signatures": []} == leads_to


@both_storages
def test_the_build_trace_of_current_nix(builder: Nix, cache: Server) -> None:
    """The layout that replaces realisations from Nix 2.35 on."""
    (library,) = builder.build(CONTENT_ADDRESSED, "library")
    push(builder, cache, library)
    name = f"/main/build-trace-v2/{'0' * 32}-library.drv/out.doi"
    trace = _json({"outPath": _base_name(library), "signatures": []})
    assert cache.client().get(name).status == 404
    assert cache.pusher.put(name, trace).status == 204
    answer = cache.client().get(name)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    found = json.loads(answer.body)
    assert [signature["keyName"] for signature in found["signatures"]] == ["main-1"]
    assert found | {"signatures": []} == json.loads(trace)


@both_storages
def test_the_index_of_debug_info(builder: Nix, cache: Server, client: Nix) -> None:
    (symbols,) = builder.build(WITH_DEBUG_INFO, "symbols")
    builder.run("nix", "copy", "--to", f"{cache.main}?index-debug-info=true", symbols)
    answer = cache.client().get(f"/main/debuginfo/{BUILD_ID}.debug")
    assert answer.headers["content-type"] == "application/json"
    entry = json.loads(answer.body)
    assert entry["member"] == f"lib/debug/.build-id/{BUILD_ID[:2]}/{BUILD_ID[2:]}.debug"
    assert entry["archive"].startswith("../nar/")
    assert cache.client().head(f"/main/{entry['archive'].removeprefix('../')}").status == 200
    assert client.run("nix", "store", "cat", "--store", cache.main, f"{symbols}/{entry['member']}") == "symbols"
    # the other name that is in use
    assert cache.client().get(f"/main/debuginfo/{BUILD_ID}").status == 404
    assert cache.pusher.put(f"/main/debuginfo/{BUILD_ID}", answer.body).status == 204
    assert cache.client().get(f"/main/debuginfo/{BUILD_ID}").body == answer.body


ENCODERS = {
    "gzip": gzip.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "identity": bytes,
}


@both_storages
def test_metadata_that_comes_encoded_is_served_plain(builder: Nix, cache: Server, client: Nix) -> None:
    """What newer Nix sends with `narinfo-compression`, `ls-compression` and `log-compression`."""
    pusher = cache.pusher
    for coding, encode in ENCODERS.items():
        path = builder.add(coding, f"some text for {coding}")
        by_copy(builder, cache, path)
        hash_part = _base_name(path)[:32]
        narinfo = pusher.get(f"/main/{hash_part}.narinfo").body
        signed = narinfo + b"Sig: other-1:" + b"A" * 86 + b"==\n"
        log = b"a build log\n" * 1000
        listing = pusher.get(f"/main/{hash_part}.ls").body
        for name, plain in (
            (f"{hash_part}.narinfo", signed),
            (f"log/{hash_part}-library.drv", log),
            (f"{hash_part}.ls", listing),
        ):
            assert pusher.put(f"/main/{name}", encode(plain), Content_Encoding=coding).status == 204
            answer = pusher.get(f"/main/{name}")
            assert "content-encoding" not in answer.headers
            assert sorted(answer.body.splitlines()) == sorted(plain.splitlines())
        client.run("nix", "copy", "--from", cache.main, path)


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
