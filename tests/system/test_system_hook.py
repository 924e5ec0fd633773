"""The post-build-hook of real builds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.system.nix import CHAIN

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.nix import Nix


def install_hook(nix: Nix, queue: Path) -> None:
    """As a program of its own, with what nix.conf has to say of it."""
    script = nix.folder / "hook"
    # The daemon of a user who builds has the environment of that user; here it shall be of no use.
    script.write_text(
        "#!/bin/sh\n"
        f"exec env -i PYTHONPATH='{nix.environment.get('PYTHONPATH', '')}' OUT_PATHS=\"$OUT_PATHS\" "
        f"DRV_PATH=\"$DRV_PATH\" '{sys.executable}' -m cachesrv hook --queue '{queue}'\n"
    )
    script.chmod(0o755)
    nix.configure(post_build_hook=str(script))


def queued(queue: Path) -> list[str]:
    return [file.read_text() for file in sorted((queue / "incoming").iterdir())]


def test_every_build_is_queued_once_in_order(builder: Nix, tmp_path: Path) -> None:
    install_hook(builder, tmp_path / "queue")
    builder.build(CHAIN, "program")
    builder.build(CHAIN, "program", "tool")

    derivations = [entry.splitlines()[0] for entry in queued(tmp_path / "queue")]
    assert [line.rpartition("-")[2] for line in derivations] == ["library.drv", "tool.drv", "program.drv"]
    assert all(line.startswith(f"drv {builder.store_dir}/") for line in derivations)


def test_a_queue_that_cannot_be_written_stops_no_build(builder: Nix, tmp_path: Path) -> None:
    (tmp_path / "queue").touch()
    install_hook(builder, tmp_path / "queue")
    (builder.folder / "default.nix").write_text(CHAIN)

    done = builder.attempt("nix-build", "--no-out-link", "default.nix", "-A", "program")

    assert done.returncode == 0
    assert done.stderr.count("post-build-hook: cachesrv hook: the queue cannot be written: Not a directory") == 3
