"""Upstreams that a reload brings are as those of the start."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from cachesrv import wiring
from cachesrv.services.caches import DeclaredUpstream
from cachesrv.services.circle import ASKED_BY
from cachesrv.telemetry import Metrics
from tests.fake_upstream import KEY, FakeUpstream, sent, waiting
from tests.offline import OfflineServer
from tests.samples import Sample
from tests.service_site import served_cache

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = Sample("sample", b"content", compression="zstd")
NARINFO = f"{SAMPLE.path.hash_part}.narinfo"


@pytest.fixture
def offline(tmp_path: Path) -> OfflineServer:
    return OfflineServer(tmp_path)


async def test_what_they_are_being_asked_is_finished_before_they_are_closed(offline: OfflineServer) -> None:
    async with FakeUpstream() as server:
        server.add(SAMPLE)
        asked, gate = asyncio.Event(), asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            asked.set()
            return await waiting(gate, sent(server.objects[NARINFO]))(request)

        server.fail(NARINFO, answer)
        declared = DeclaredUpstream("new", server.url, (KEY.public.render(),), 5)
        cache = served_cache(pull_through=True, upstreams=(declared,))
        async with wiring.open_services(offline.config, Metrics()) as services:
            asking = asyncio.create_task(services.lookup.find(cache, SAMPLE.path.hash_part))
            await asked.wait()
            gate.set()
        assert await asking


async def test_machines_that_are_called_alike_are_not_taken_for_each_other(
    offline: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One would ask nobody on behalf of the other: it would seem to be asked by itself."""
    names: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        names.append(request.headers[ASKED_BY])
        return web.Response(status=404)

    async with FakeUpstream() as server:
        server.fail(NARINFO, answer, answer, answer)
        declared = DeclaredUpstream("upstream", server.url, (KEY.public.render(),), 5)
        cache = served_cache(pull_through=True, upstreams=(declared,))
        for machine in ("first", "second", "second"):
            monkeypatch.setattr(wiring, "place", lambda machine=machine: machine)
            async with wiring.open_services(offline.config, Metrics()) as services:
                services.index.clear(cache.name)
                assert not await services.lookup.find(cache, SAMPLE.path.hash_part)
    first, second, again = names
    assert first != second == again
