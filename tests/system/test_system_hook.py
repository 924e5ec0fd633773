"""The post-build-hook of real builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.system.nix import CHAIN
from tests.system.queues import Queue

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.nix import Nix
    from tests.system.server import Server


def queued(queue: Path) -> list[str]:
    return [file.read_text() for file in sorted((queue / "incoming").iterdir())]


def test_every_build_is_queued_once_in_order(builder: Nix, cache: Server) -> None:
    queue = Queue(builder, cache)
    queue.install_hook()
    builder.build(CHAIN, "program")
    builder.build(CHAIN, "program", "tool")

    derivations = [entry.splitlines()[0] for entry in queued(queue.directory)]
    assert [line.rpartition("-")[2] for line in derivations] == ["library.drv", "tool.drv", "program.drv"]
    assert all(line.startswith(f"drv {builder.store_dir}/") for line in derivations)


def test_a_queue_that_cannot_be_written_stops_no_build(builder: Nix, cache: Server) -> None:
    queue = Queue(builder, cache)
    queue.directory.touch()
    queue.install_hook()
    (builder.folder / "default.nix").write_text(CHAIN)

    done = builder.attempt("nix-build", "--no-out-link", "default.nix", "-A", "program")

    assert done.returncode == 0
    assert done.stderr.count(f"cachesrv hook: the queue {queue.directory} cannot be written: Not a directory") == 3
