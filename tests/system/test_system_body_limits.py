"""Behind nginx as it comes, which takes bodies of at most 1 MiB, and behind who ends connections where more comes."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.system.client import Client
from tests.system.push import attempt, events, push
from tests.system.server import until
from tests.tcp_proxy import End, TcpProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.system.conftest import MakeClient
    from tests.system.nix import Nix
    from tests.system.server import Server

MIB = 2**20
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
CONFIG = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log {folder}/access.log combined;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    server {{
        listen 127.0.0.1:{port};
        {settings}
        location / {{ proxy_pass {upstream}; }}
    }}
}}
"""


@contextmanager
def nginx(folder: Path, upstream: str, settings: str = "") -> Iterator[str]:
    """In front of a server; the URL where it answers."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = folder / "nginx.conf"
    file.write_text(CONFIG.format(folder=folder, port=port, upstream=upstream, settings=settings))
    with subprocess.Popen([NGINX, "-p", str(folder), "-c", str(file), "-e", str(folder / "error.log")]) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: _answers(url), "nginx does not answer")
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return Client(url).get("/health/live").status == 200
    except OSError:
        return False


STREAMED = "proxy_request_buffering off; proxy_http_version 1.1;"


@pytest.mark.parametrize("settings", ["", STREAMED], ids=["buffered", "streamed"])
def test_a_push_gets_through(
    builder: Nix, cache: Server, make_client: MakeClient, tmp_path: Path, settings: str
) -> None:
    paths = [
        builder.add(f"file-{size}", random.Random(size).randbytes(size))
        for size in (1, 1000, MIB // 2, MIB - 1, MIB, 3 * MIB, 20 * MIB)
    ]
    with nginx(tmp_path / "nginx", cache.main.removesuffix("/main"), settings) as url:
        done = attempt(builder, cache, "--to", f"{url}/main", *paths)
        assert done.returncode == 0, done.stderr + done.stdout[-2000:]
        again = push(builder, cache, "--to", f"{url}/main", *paths)

    told = events(done)
    assert (told[-1]["uploaded"], again["present"]) == (len(paths), len(paths))
    assert any("bodies of at most" in event["text"] for event in told if event["event"] == "noted")
    client = make_client(cache)
    client.run("nix", "copy", "--from", cache.main, *paths)
    assert client.hashes(*paths) == builder.hashes(*paths)


def port(server: Server) -> int:
    return int(server.main.removesuffix("/main").rpartition(":")[2])


@pytest.mark.parametrize("end", End, ids=lambda end: end.value)
async def test_a_push_gets_through_where_connections_end(
    builder: Nix, cache: Server, make_client: MakeClient, end: End
) -> None:
    paths = [builder.add(f"file-{size}", random.Random(size).randbytes(size)) for size in (1000, 3 * MIB, 20 * MIB)]
    async with TcpProxy(port(cache), takes=MIB + 4096, end=end).running() as proxy:
        url = f"http://127.0.0.1:{proxy.port}/main"
        done = await asyncio.to_thread(attempt, builder, cache, "--to", url, *paths)

    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    assert any(f"bodies of at most {MIB} " in event["text"] for event in events(done) if event["event"] == "noted")
    client = make_client(cache)
    client.run("nix", "copy", "--from", cache.main, *paths)
    assert client.hashes(*paths) == builder.hashes(*paths)
