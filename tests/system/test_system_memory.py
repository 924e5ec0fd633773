"""Memory is bounded, whatever the size of a NAR; `bench/memory.py` is the same with 4 GiB."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from bench import memory
from tests.samples import Sample

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.server import Server

MIB = 1024 * 1024
LIMIT = 200 * MIB
SIZE = 300 * MIB


def test_a_large_nar_is_pushed_and_fetched(tmp_path: Path) -> None:
    """Larger than what either side may hold."""
    steps = memory.run(tmp_path, SIZE)
    assert len(steps) == 6
    for step in steps:
        assert 20 * MIB < step.server < LIMIT, step
        assert step.uploader is None or 20 * MIB < step.uploader < LIMIT, step


def test_many_clients_at_once(server: Server) -> None:
    """Forty uploads and forty downloads of 10 MiB each: twice as much as the server may hold."""
    samples = [Sample(f"sample-{number}", number.to_bytes(8, "big") * (10 * MIB // 8)) for number in range(40)]

    def exchange(sample: Sample) -> tuple[int, bool]:
        put = server.pusher.put(sample.nar_url, sample.file)
        return put.status, server.client().get(sample.nar_url).body == sample.file

    with ThreadPoolExecutor(len(samples)) as clients:
        assert set(clients.map(exchange, samples)) == {(204, True)}
    assert server.peak_memory < LIMIT
