"""The two ways to fill a cache: `cachesrv push` as a process of its own, and `nix copy`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.server import CACHESRV

if TYPE_CHECKING:
    from tests.system.nix import Nix
    from tests.system.server import Server

Fill = Callable[..., None]
"""Called with a machine, a server and paths."""

PATIENCE = 120.0
"""Seconds after which an uploader is taken to hang."""


def command(nix: Nix, server: Server, *arguments: str) -> list[str]:
    """The command that pushes from a machine's store to `main`; arguments are paths and more options."""
    options = ["--to", server.main, "--token-file", str(server.token_file), "--store", nix.store, "--json"]
    return [*CACHESRV, "push", *options, *arguments]


def started(nix: Nix, server: Server, *arguments: str) -> subprocess.Popen[bytes]:
    """One that somebody ends: nobody hears what it tells."""
    return subprocess.Popen(
        command(nix, server, *arguments),
        env=nix.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def attempt(nix: Nix, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(nix, server, *arguments),
        check=False,
        env=nix.environment | {"CACHESRV_DEBUG": "1"},
        cwd=nix.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def push(nix: Nix, server: Server, *arguments: str) -> dict[str, Any]:
    """Push, which has to succeed; its summary."""
    done = attempt(nix, server, *arguments)
    assert done.returncode == 0, f"push failed with {done.returncode}:\n{done.stdout}{done.stderr}"
    return events(done)[-1]


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """All that a push told, the summary last."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_copy(nix: Nix, server: Server, *paths: str) -> None:
    """`nix copy --to`, with the token in netrc."""
    nix.run("nix", "copy", "--to", server.main, *paths)


def by_push(nix: Nix, server: Server, *paths: str) -> None:
    """`cachesrv push`."""
    push(nix, server, *paths)


both_ways = pytest.mark.parametrize("fill", [by_copy, by_push])
