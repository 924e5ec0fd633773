"""What is left to other caches: only what they certainly have, with all that it needs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from cachesrv import api
from cachesrv.errors import ServerError
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey, fingerprint
from cachesrv.push import upstreams
from cachesrv.push.events import Event, Noted
from cachesrv.push.token import FirstToken
from cachesrv.push.upstreams import Upstream, Upstreams
from tests.fake_upstream import KEY, FakeUpstream, Fault, hang, status, trickling
from tests.push_doubles import STORE_DIR, path_info, signed_narinfo, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from cachesrv.nix.path_info import PathInfo


def signed(info: PathInfo, key: SecretKey = KEY) -> PathInfo:
    return replace(info, signatures=("no signature", signed_narinfo(info, key).signatures[0].render()))


BASE = signed(path_info("base"))
LIBRARY = signed(path_info("library", ["base", "library"]))
PROGRAM = signed(path_info("program", ["library", "base"]))
OURS = path_info("ours", ["program"])


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as running:
        yield running


def hold(upstream: FakeUpstream, *infos: PathInfo, key: SecretKey = KEY) -> None:
    for info in infos:
        upstream.objects[f"{info.store_path.hash_part}.narinfo"] = narinfo.render(signed_narinfo(info, key))


def asked(upstream: FakeUpstream) -> set[str]:
    """Names of the paths that it was asked for."""
    names = {store_path(name).hash_part: name for name in ("base", "library", "program", "ours")}
    return {names[name.removesuffix(".narinfo")] for _, name in upstream.requests}


async def left_out(
    infos: Iterable[PathInfo], *urls: str, told: list[Event] | None = None, present: Iterable[str] = ()
) -> dict[str, str]:
    infos = list(infos)
    missing = {info.store_path.base_name for info in infos if info.store_path.name not in present}
    known = [Upstream.from_answer(api.UpstreamAnswer(url, [KEY.public.render()])) for url in urls]
    noted: list[Event] = [] if told is None else told
    async with Upstreams(known, STORE_DIR, lambda _: FirstToken(lambda: ()), noted.append) as asking:
        left = await asking.left_out(infos, missing)
    return {path.name: reason for path, reason in left.items()}


async def test_one_question_makes_sure_of_a_closure(upstream: FakeUpstream) -> None:
    hold(upstream, BASE, LIBRARY, PROGRAM)

    left = await left_out([BASE, LIBRARY, PROGRAM, OURS], upstream.url)

    assert left.keys() == {"base", "library", "program"}
    assert asked(upstream) == {"program", "ours"}
    assert left["program"] == f"{upstream.url} has it, signed"
    assert left["base"] == f"signed by {upstream.url}, which has what refers to it"


async def test_what_is_gone_there_is_sent_and_its_references_are_asked_for(upstream: FakeUpstream) -> None:
    hold(upstream, BASE)

    left = await left_out([BASE, LIBRARY, PROGRAM], upstream.url)

    assert left.keys() == {"base"}
    assert asked(upstream) == {"program", "library", "base"}


async def test_what_was_built_or_added_here_is_not_asked_for(upstream: FakeUpstream) -> None:
    built = replace(path_info("library"), ultimate=True)
    added = replace(path_info("base"), ca="text:sha256:x")

    assert await left_out([built, added], upstream.url) == {}
    assert not upstream.requests


async def test_signatures_that_were_lost_on_the_way_are_found_again(upstream: FakeUpstream) -> None:
    hold(upstream, BASE, LIBRARY, PROGRAM)
    bare = [replace(info, signatures=()) for info in (BASE, LIBRARY, PROGRAM)]

    assert (await left_out(bare, upstream.url)).keys() == {"base", "library", "program"}


async def test_a_narinfo_that_says_something_else_counts_for_nothing(upstream: FakeUpstream) -> None:
    hold(upstream, path_info("base", nar="another build"))
    hold(upstream, LIBRARY, key=SecretKey.generate("upstream-1"))
    upstream.objects[f"{PROGRAM.store_path.hash_part}.narinfo"] = b"nonsense"

    assert await left_out([BASE, LIBRARY, PROGRAM], upstream.url) == {}


async def test_paths_in_the_cache_are_not_asked_for(upstream: FakeUpstream) -> None:
    hold(upstream, BASE, LIBRARY, PROGRAM)

    assert await left_out([BASE, LIBRARY, PROGRAM], upstream.url, present=["program", "library", "base"]) == {}
    assert not upstream.requests


async def test_the_next_one_is_asked_when_the_first_has_it_not(upstream: FakeUpstream) -> None:
    hold(upstream, BASE)
    async with FakeUpstream() as empty:
        left = await left_out([BASE], empty.url, upstream.url)

    assert left == {"base": f"{upstream.url} has it, signed"}
    assert empty.requests


async def test_an_upstream_that_fails_is_told_of_once_and_asked_no_more(upstream: FakeUpstream) -> None:
    hold(upstream, BASE, LIBRARY, PROGRAM)

    async def forbid(_request: web.Request) -> web.Response:
        return web.Response(status=403, text="not for you")

    upstream.faults = {f"{info.store_path.hash_part}.narinfo": iter([forbid]) for info in (BASE, LIBRARY, PROGRAM)}
    told: list[Event] = []

    assert await left_out([BASE, LIBRARY, PROGRAM], upstream.url, told=told) == {}
    (noted,) = told
    assert isinstance(noted, Noted)
    assert noted.text.startswith(f"nothing is left to the upstream {upstream.url}: ")
    assert asked(upstream) == {"program"}


@pytest.mark.parametrize(
    "fault", [status(503, Retry_After="100"), status(429, Retry_After="100"), trickling(b"StorePath: ", 0.01), hang]
)
async def test_an_upstream_that_keeps_us_waiting_holds_up_no_push(
    upstream: FakeUpstream, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "DEADLINE", 0.05)
    hold(upstream, BASE)
    upstream.fail(f"{BASE.store_path.hash_part}.narinfo", fault)
    told: list[Event] = []

    async with asyncio.timeout(50):
        assert await left_out([BASE], upstream.url, told=told) == {}
    assert len(told) == 1


async def test_an_upstream_that_cannot_be_asked_gets_nothing() -> None:
    told: list[Event] = []

    assert await left_out([BASE], "s3://bucket", told=told) == {}
    assert "s3://bucket" in str(told)


@pytest.mark.parametrize("lie", ["name of the key", "NAR size", "references", "store directory"])
def test_a_signature_counts_only_for_what_was_signed(lie: str) -> None:
    key = SecretKey.generate("upstream-1") if lie == "name of the key" else KEY
    text = fingerprint(
        BASE.store_path.full("/other" if lie == "store directory" else STORE_DIR),
        BASE.nar_hash,
        BASE.nar_size + (lie == "NAR size"),
        [OURS.store_path.full(STORE_DIR)] if lie == "references" else [],
    )
    upstream = Upstream.from_answer(api.UpstreamAnswer("https://upstream.example.org", [KEY.public.render()]))

    assert upstream.signed(BASE, STORE_DIR)
    assert not upstream.signed(replace(BASE, signatures=(key.sign(text).render(),)), STORE_DIR)


def test_keys_of_upstreams_that_are_none_are_the_servers_fault() -> None:
    with pytest.raises(ServerError, match="public key"):
        Upstream.from_answer(api.UpstreamAnswer("https://upstream.example.org", ["nonsense"]))
