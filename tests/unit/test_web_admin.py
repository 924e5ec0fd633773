"""What load balancers ask again and again costs the same however much is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.front_site import open_site, plain_server

if TYPE_CHECKING:
    from pathlib import Path


async def test_who_is_asked_whether_it_is_ready_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_site(tmp_path) as site, plain_server(site) as port, aiohttp.ClientSession() as session:
        catalog, url = site.services.catalog, f"http://127.0.0.1:{port}/health/ready"
        monkeypatch.setattr(catalog, "count", lambda _: pytest.fail("all paths are counted"))
        async with session.get(url) as answer:
            assert (answer.status, await answer.text()) == (200, "ready\n")
        await catalog.close()
        async with session.get(url) as answer:
            assert answer.status in {500, 503}
