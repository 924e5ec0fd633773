"""What operators and load balancers ask again and again costs the same however much is there, and whatever fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

from cachesrv.errors import StoreError
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


async def test_what_is_counted_is_told_also_when_stores_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StoreError("the index cannot be read")

    async with open_site(tmp_path) as site, plain_server(site) as port, aiohttp.ClientSession() as session:
        monkeypatch.setattr(site.services.index, "count", fail)
        await site.services.catalog.close()
        async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            text = await answer.text()
        assert answer.status == 200
        assert "cachesrv_sent_bytes_total" in text
        assert "cachesrv_index_paths" not in text
