"""How much memory do the server and the uploader take for one large NAR?

    python -m bench.memory [SIZE]          such as "4 GiB" (the default) or "300 MiB"

One file of this size, half of it random bytes and half of it text, becomes a store path. It is sent by `cachesrv push`,
then as Nix and curl do (PUT of the bare NAR to a second server), and fetched again whole, in parts, and by eight
clients at once. Printed is the most memory that each process held at any time (VmHWM, proc(5)).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cachesrv.config import with_unit
from cachesrv.nix.hashes import Hash
from tests.system import push
from tests.system.nix import Nix
from tests.system.server import Server, inherited

MIB = 1024 * 1024
READERS = 8

_TOLD = """
import runpy, sys
sys.argv[0] = "cachesrv"
try:
    runpy.run_module("cachesrv", run_name="__main__")
finally:
    with open("/proc/self/status") as status:
        sys.stderr.write(next(line for line in status if line.startswith("VmHWM:")))
"""
"""Runs a command as `python -m cachesrv` does, and tells at its end how much memory it held at most."""


@dataclass(frozen=True)
class Step:
    """What was done, in how many seconds, and the peaks in bytes; that of the uploader where there was one."""

    what: str
    seconds: float
    server: int
    uploader: int | None = None

    def __str__(self) -> str:
        uploader = "" if self.uploader is None else f"   uploader {self.uploader / MIB:4.0f} MiB"
        return f"{self.what:38} {self.seconds:6.1f} s   server {self.server / MIB:4.0f} MiB{uploader}"


def write_file(path: Path, size: int) -> None:
    """Mebibytes of random bytes and of text in turns."""
    text = (b"the quick brown fox jumps over the lazy dog %d\n" * (MIB // 40))[:MIB]
    with path.open("wb") as file:
        for number in range(0, size, MIB):
            piece = os.urandom(MIB) if number // MIB % 2 else text
            file.write(piece[: size - number])


def measured_push(nix: Nix, server: Server, path: str) -> tuple[int, float]:
    """Peak memory of `cachesrv push` in bytes, and its seconds."""
    arguments = push.command(nix, server, path)[3:]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _TOLD, *arguments],
        check=False,
        env=nix.environment,
        capture_output=True,
        text=True,
        cwd=nix.folder,
    )
    if done.returncode:
        raise SystemExit(f"push failed:\n{done.stdout}{done.stderr}")
    match = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert match
    return int(match[1]) * 1024, time.monotonic() - started


def curl(*arguments: str) -> None:
    """Runs curl, which has to succeed."""
    command = ["curl", "--silent", "--show-error", "--fail", *arguments]
    subprocess.run(command, check=True, env=inherited(), stdout=subprocess.DEVNULL)


def timed(what: str, server: Server, *arguments: str) -> Step:
    """One run of curl."""
    started = time.monotonic()
    curl(*arguments)
    return Step(what, time.monotonic() - started, server.peak_memory)


def run(folder: Path, size: int) -> list[Step]:
    """All of it, below a folder that needs some three times the size."""
    nix = Nix(folder / "nix")
    large = folder / "large"
    write_file(large, size)
    path = nix.run("nix-store", "--add", str(large))
    large.unlink()
    return [*_pushed(Server(folder / "first").start(), nix, path), *_put(Server(folder / "second").start(), nix, path)]


def _pushed(server: Server, nix: Nix, path: str) -> list[Step]:
    try:
        peak, seconds = measured_push(nix, server, path)
        (nar,) = (server.objects / "nar").iterdir()
        url = f"{server.main}/nar/{nar.name}"
        steps = [Step("cachesrv push", seconds, server.peak_memory, peak)]
        steps.append(timed("fetched whole", server, url))
        steps.append(timed("fetched from the middle on", server, "--range", f"{nar.stat().st_size // 2}-", url))
        started = time.monotonic()
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(curl, [url] * READERS))
        return [*steps, Step(f"fetched by {READERS} at once", time.monotonic() - started, server.peak_memory)]
    finally:
        server.kill()


def _put(server: Server, nix: Nix, path: str) -> list[Step]:
    try:
        dumped = nix.folder / "dumped.nar"
        digest = sha256()
        command = ["nix-store", "--dump", str(nix.root / Path(path).name)]
        with dumped.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            while piece := process.stdout.read(MIB):
                digest.update(piece)
                file.write(piece)
        name = Hash("sha256", digest.digest()).bare_nix32
        header = nix.folder / "header"
        header.write_text(f"Authorization: Bearer {server.token}\nExpect: 100-continue\n")
        step = timed(
            "PUT of the bare NAR by curl",
            server,
            "-H",
            f"@{header}",
            "-T",
            str(dumped),
            f"{server.main}/nar/{name}.nar",
        )
        dumped.unlink()
        return [step, timed("fetched whole", server, f"{server.main}/nar/{name}.nar")]
    finally:
        server.kill()


def main() -> None:
    size = with_unit(sys.argv[1] if len(sys.argv) > 1 else "4 GiB", "size")
    with tempfile.TemporaryDirectory(prefix="cachesrv-memory-", ignore_cleanup_errors=True) as folder:
        for step in run(Path(folder), size):
            print(step, flush=True)


if __name__ == "__main__":
    main()
