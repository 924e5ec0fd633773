"""The server has garbage collected by itself, and goes on whatever becomes of that."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.offline import DAY, pass_time
from tests.system.server import Server, until

if TYPE_CHECKING:
    from tests.system.conftest import StartServer
    from tests.system.nix import Nix

_CONFIG = """
[server]
workers = 2
[collect]
interval = 1
nar_grace = 0
[[cache]]
name = "main"
retention_age = "90 d"
"""


@pytest.fixture
def server(make_server: StartServer) -> Server:
    return make_server(config=_CONFIG).start()


def counted(server: Server, name: str) -> float:
    found = re.search(rf"^cachesrv_{name} (\S+)$", server.client().get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def collectors(server: Server) -> set[int]:
    """Processes that collect for it (proc(5))."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"gc" in words and str(server.data_dir).encode() in words:
                found.add(int(entry.name))
    return found


def test_it_is_done_seen_and_logged(server: Server, nix: Nix) -> None:
    path = nix.add("old", "content")
    nix.log_in(server.token)
    nix.run("nix", "copy", "--to", server.main, path)
    narinfo = f"/main/{Path(path).name[:32]}.narinfo"
    until(lambda: counted(server, "collections_total") > 0, "nothing is collected")
    assert counted(server, "paths_collected_total") == 0
    assert counted(server, "collected_at_seconds") > 1e9
    assert server.client().get(narinfo).status == 200
    pass_time(server.data_dir / "catalog.sqlite", 91 * DAY)
    until(lambda: counted(server, "paths_collected_total") == 1, "the path is not collected")
    until(lambda: counted(server, "nars_collected_total") == 1, "the NAR is not collected")
    assert counted(server, "collected_bytes_total") > 0
    assert counted(server, "collections_failed_total") == 0
    for _ in range(4):
        assert server.client().get(narinfo).status == 404
    assert not [*(server.objects / "nar").iterdir()]
    assert '"event": "garbage collected"' in server.log
    assert server.stop() == 0
    assert not collectors(server)


def test_a_collector_that_is_killed_stops_nothing(server: Server) -> None:
    def killed() -> bool:
        for pid in collectors(server):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return counted(server, "collections_failed_total") > 0

    until(killed, "nobody noticed")
    assert "the garbage collection failed" in server.log
    before = counted(server, "collections_total")
    until(lambda: counted(server, "collections_total") > before, "it is not tried again")
    assert server.client().get("/main/nix-cache-info").status == 200


def test_a_configuration_that_became_wrong_stops_nothing(make_server: StartServer) -> None:
    # one worker: another might start only when the configuration has become wrong
    server = make_server(config=_CONFIG.replace("workers = 2", "workers = 1")).start()
    server.config_file.write_text("[collect]\ninterval = 'often'\n")
    until(lambda: counted(server, "collections_failed_total") > 0, "nobody noticed")
    assert "collect.interval = 'often': expected a time" in server.log
    assert server.client().get("/main/nix-cache-info").status == 200
    server.config_file.write_text(_CONFIG)
    until(lambda: counted(server, "collections_total") > 0, "it is not tried again")


def test_not_if_nobody_wants_it(make_server: StartServer) -> None:
    server = make_server(config=_CONFIG.replace("interval = 1", "interval = 0")).start()
    assert server.stop() == 0
    assert "garbage" not in server.log
