"""Two real caches, one of which is declared as the other's upstream: what is there already is not pushed again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cachesrv.nix.signing import SecretKey
from tests.system.nix import CHAIN
from tests.system.push import attempt, events, push

if TYPE_CHECKING:
    from tests.system.conftest import MakeClient, StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server


@pytest.fixture
def upstream(cache: Server) -> Server:
    """Somebody else's cache."""
    return cache


OUR_KEY = SecretKey.generate("ours-1")


def beside(make_server: StartServer, upstream: Server, builder: Nix, references: str) -> Server:
    """A cache whose clients use the upstream as well."""
    key = builder.folder / "ours.secret"
    key.touch(0o600)
    key.write_text(OUR_KEY.render())
    config = f"""
        [server]
        store_dir = "{builder.store_dir}"
        [[upstream]]
        name = "others"
        url = "{upstream.main}"
        public_keys = ["{upstream.public_key}"]
        [[cache]]
        name = "main"
        signing_key_files = ["{key}"]
        references = "{references}"
        upstreams = ["others"]
    """
    return make_server(config=config).start()


def of_both(make_client: MakeClient, ours: Server, upstream: Server) -> Nix:
    """A client that uses both."""
    client = make_client(upstream)
    keys = f"{OUR_KEY.public.render()} {upstream.public_key}"
    client.configure(substituters=f"{ours.main} {upstream.main}", trusted_public_keys=keys)
    return client


def sign(builder: Nix, upstream: Server, *paths: str) -> None:
    """Give the paths the signatures that they would have had they come from the upstream."""
    builder.run("nix", "store", "sign", "-k", str(upstream.data_dir / "keys" / "main.secret"), *paths)


@pytest.mark.parametrize("references", ["upstream", "any"])
def test_what_the_upstream_has_is_left_to_it(
    builder: Nix, upstream: Server, make_server: StartServer, make_client: MakeClient, references: str
) -> None:
    library, tool, program = builder.build(CHAIN, "library", "tool", "program")
    push(builder, upstream, tool)
    sign(builder, upstream, library, tool)
    ours = beside(make_server, upstream, builder, references)

    dry = {
        event["path"]: event for event in events(attempt(builder, ours, "--dry-run", program)) if "decision" in event
    }
    summary = push(builder, ours, program)

    assert (summary["uploaded"], summary["upstream"], summary["failed"]) == (1, 2, 0)
    assert [path.name for path in ours.objects.glob("*.narinfo")] == [f"{_base(program)[:32]}.narinfo"]
    assert dry[_base(tool)]["reason"] == f"{upstream.main} has it, signed"
    assert dry[_base(library)]["reason"] == f"signed by {upstream.main}, which has what refers to it"
    client = of_both(make_client, ours, upstream)
    client.run("nix-store", "-r", program)
    assert client.hashes(program) == builder.hashes(program)


@pytest.mark.parametrize("references", ["upstream", "any"])
def test_what_the_upstream_has_lost_is_pushed(
    builder: Nix, upstream: Server, make_server: StartServer, make_client: MakeClient, references: str
) -> None:
    """A signature says that it was there once: the closure stays whole all the same."""
    library, tool, program = builder.build(CHAIN, "library", "tool", "program")
    push(builder, upstream, library)
    sign(builder, upstream, library, tool)
    ours = beside(make_server, upstream, builder, references)

    summary = push(builder, ours, program)

    assert (summary["uploaded"], summary["upstream"], summary["failed"]) == (2, 1, 0)
    client = of_both(make_client, ours, upstream)
    client.run("nix-store", "-r", program)


def test_an_upstream_that_is_out_of_reach_gets_nothing(
    builder: Nix, upstream: Server, make_server: StartServer, client: Nix
) -> None:
    library, tool, program = builder.build(CHAIN, "library", "tool", "program")
    push(builder, upstream, tool)
    sign(builder, upstream, library, tool)
    ours = beside(make_server, upstream, builder, "any")
    upstream.stop()

    done = attempt(builder, ours, program)

    assert done.returncode == 0, done.stderr
    assert events(done)[-1]["uploaded"] == 3
    assert any(event["event"] == "noted" and upstream.main in event["text"] for event in events(done))
    client.configure(substituters=ours.main, trusted_public_keys=OUR_KEY.public.render())
    client.run("nix-store", "-r", program)


def test_a_cache_that_is_to_be_whole_names_no_upstream(
    builder: Nix, upstream: Server, make_server: StartServer
) -> None:
    library, tool, program = builder.build(CHAIN, "library", "tool", "program")
    push(builder, upstream, program)
    sign(builder, upstream, library, tool, program)
    ours = beside(make_server, upstream, builder, "strict")

    assert json.loads(ours.client().get("/api/v1/caches/main").body)["upstreams"] == []
    assert push(builder, ours, program)["uploaded"] == 3


def test_options_add_upstreams_and_pass_over_them(builder: Nix, upstream: Server, make_server: StartServer) -> None:
    library, tool, program = builder.build(CHAIN, "library", "tool", "program")
    push(builder, upstream, tool)
    sign(builder, upstream, library, tool)
    named = beside(make_server, upstream, builder, "upstream")
    alone = make_server(
        config=f'[server]\nstore_dir = "{builder.store_dir}"\n[[cache]]\nname = "main"\nreferences = "any"'
    )
    alone.start()

    with_key = ("--upstream", upstream.main, "--upstream-key", upstream.public_key)
    assert push(builder, named, "--dry-run", "--no-upstreams", program)["upstream"] == 0
    assert push(builder, alone, *with_key, program)["upstream"] == 2
    builder.configure(trusted_public_keys=upstream.public_key)
    assert push(builder, alone, "--dry-run", "--upstream", upstream.main, program)["upstream"] == 2


def _base(path: str) -> str:
    return path.rpartition("/")[2]
