"""The server is killed at any moment of concurrent pushes: what is visible can be kept, and a push goes on."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system import push
from tests.system.server import until

if TYPE_CHECKING:
    from tests.system.client import Answer
    from tests.system.nix import Nix
    from tests.system.server import Server

ROUNDS = 4
SMALL, LARGE = 30, 3
MIB = 1024 * 1024

# A path refers to the one before it and to the one at half its number: chains as well as fans.
PATHS = """
    let
      make = number: builtins.toFile "path-${toString number}" "%s ${references number}";
      references = number: if number == 0 then "" else "${path (number - 1)} ${path (number / 2)}";
      path = number: builtins.elemAt paths number;
      paths = builtins.genList make %d;
    in paths
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_while_pushes_run(builder: Nix, cache: Server, client: Nix, seed: int) -> None:
    moments = random.Random(seed)
    every: list[str] = []
    cut_short = 0
    for number in range(ROUNDS):
        text = builder.evaluate(PATHS % (f"{seed}-{number}", SMALL))
        large = [builder.add(f"large-{at}", moments.randbytes(2 * MIB)) for at in range(LARGE)]
        every += text + large
        pushers = [
            push.command(builder, cache, "--jobs", "4", text[-1], *large),
            ["nix", "copy", "--to", cache.main, text[SMALL // 2], large[0]],
        ]
        _kill_while(builder, cache, pushers, moments.randrange(SMALL + LARGE), moments.uniform(0, 0.05))
        cache.start()
        visible = _check_what_is_visible(cache, client, every)
        cut_short += len(visible) < len(every)
        push.push(builder, cache, text[-1], *large)
        assert _check_what_is_visible(cache, client, every) == set(every)
    assert cut_short, "no push was cut short: this shows nothing"
    _check_that_garbage_goes(cache)


def _kill_while(builder: Nix, server: Server, pushers: list[list[str]], nars: int, pause: float) -> None:
    """Kill the server a moment after so many more NARs have come than there were."""
    folder = server.objects / "nar"
    before = _count(folder)
    running = [
        subprocess.Popen(command, env=builder.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in pushers
    ]
    try:
        while _count(folder) < before + nars and any(process.poll() is None for process in running):
            time.sleep(0.001)
        time.sleep(pause)
        server.kill()
    finally:
        for process in running:
            process.kill()
            process.wait()


def _count(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.exists() else 0  # noqa: PTH208  it is asked a thousand times a second


def _check_what_is_visible(server: Server, client: Nix, paths: list[str]) -> set[str]:
    """Every narinfo, wherever it can be seen, has its whole NAR and all its references; the paths that HTTP shows.

    What was not acknowledged may have reached the catalog, or storage alone.
    """
    by_http = {path: answer.text for path in paths if (answer := _narinfo(server, path)).status == 200}
    _check_references(by_http)
    in_folder = {_field(text, "StorePath"): text for text in _texts(server.objects)}
    _check_references(in_folder)
    in_catalog = {_field(content.decode(), "StorePath"): content.decode() for content in _published(server)}
    _check_references(in_catalog)
    assert by_http.items() <= in_catalog.items(), "clients are told something else than what is published"
    # a narinfo that was written anew, for the same NAR in another file, may have reached storage alone
    assert _nar_hashes(in_catalog).items() <= _nar_hashes(in_folder).items()
    for text in (*in_catalog.values(), *in_folder.values()):
        file = (server.objects / _field(text, "URL")).read_bytes()
        assert len(file) == int(_field(text, "FileSize"))
    for store, shown in ((server.main, by_http), (f"file://{server.objects}", in_folder)):
        if shown:
            client.forget()
            client.run("nix", "store", "verify", "--store", store, "--sigs-needed", "1", *shown)
    return set(by_http)


def _narinfo(server: Server, path: str) -> Answer:
    return server.client().get(f"/main/{Path(path).name[:32]}.narinfo")


def _check_references(texts: dict[str, str]) -> None:
    names = {Path(path).name for path in texts}
    for path, text in texts.items():
        missing = set(_field(text, "References").split()) - names
        assert not missing, f"{path} is visible without {missing}"


def _nar_hashes(texts: dict[str, str]) -> dict[str, str]:
    return {path: _field(text, "NarHash") for path, text in texts.items()}


def _texts(folder: Path) -> list[str]:
    return [file.read_text() for file in folder.glob("*.narinfo")]


def _published(server: Server) -> list[bytes]:
    return [row[0] for row in server.query("select content from narinfos")]


def _field(text: str, key: str) -> str:
    (value,) = [line.partition(": ")[2] for line in text.splitlines() if line.startswith(f"{key}: ")]
    return value


def _check_that_garbage_goes(server: Server) -> None:
    """What writers left behind that were killed is swept away by the next start, once it is old."""
    yesterday = time.time() - 86400
    for file in server.objects.rglob(".incoming-*"):
        os.utime(file, (yesterday, yesterday))
    server.stop()
    server.start()
    until(lambda: not [*server.objects.rglob(".incoming-*")], "unfinished files are left behind for ever")
