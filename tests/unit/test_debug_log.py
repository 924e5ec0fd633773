"""What `--log-level debug` tells besides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from cachesrv.errors import NotFound
from cachesrv.push.events import Published, Stored
from cachesrv.push.queue.report import LogReport
from cachesrv.web.errors import answer
from tests.samples import Sample
from tests.service_site import open_site

if TYPE_CHECKING:
    from pathlib import Path


async def test_each_path_that_is_published_or_refused(tmp_path: Path) -> None:
    here, missing = Sample("here"), Sample("missing", b"missing")
    async with open_site(tmp_path) as site:
        await site.send(here)
        with capture_logs() as logs:
            await site.add(here, missing)
    published, refused = sorted((log for log in logs if log["log_level"] == "debug"), key=lambda log: "cache" in log)
    assert published == {"event": "published", "paths": [f"main/{here.path}"], "log_level": "debug"}
    assert (refused["event"], refused["cache"], refused["path"]) == ("a path was refused", "main", str(missing.path))
    assert missing.nar_hash.nix32 in refused["error"]


def test_each_request_that_is_refused() -> None:
    with capture_logs() as logs:
        answer(make_mocked_request("GET", "/main/x?a=b"), NotFound("there is no x"))
    assert logs == [
        {
            "event": "request refused",
            "method": "GET",
            "path": "/main/x",
            "status": 404,
            "error": "there is no x",
            "log_level": "debug",
        }
    ]


def test_each_path_that_a_queue_has_sent() -> None:
    with capture_logs() as logs:
        LogReport().event(Stored("/nix/store/x", 10, 5, 0.1))
        LogReport().event(Published("/nix/store/x"))
    assert [(log["event"], log["path"], log["log_level"]) for log in logs] == [
        ("stored", "/nix/store/x", "debug"),
        ("published", "/nix/store/x", "debug"),
    ]
