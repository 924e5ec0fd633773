"""Pushes that are interrupted anywhere: they come to their end, send nothing again that was acknowledged, and what is
in the cache is whole.

Small paths go in packs, one that compresses well in one piece, large ones in parts, several at once. The places are
random, by bytes that were sent; what is sent is counted between the uploader and the server.
"""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.system import push
from tests.system.counting_proxy import CountingProxy
from tests.system.nix import MANY
from tests.system.server import CACHESRV, Server, until
from tests.system.small_disk import small_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.system.conftest import StartServer
    from tests.system.nix import Nix

MIB = 2**20
PART = MIB
SMALL = 40
LARGE = (3 * MIB, 6 * MIB, 7 * MIB + 12345)
TOTAL = sum(LARGE)
AT_ONCE = 16 + 8
"""What an uploader has on its way at most: its connections."""


@dataclass(frozen=True)
class Scene:
    """`paths` of a store are pushed to a server by way of a proxy; the last one of the small ones, which come first,
    needs all of those.
    """

    builder: Nix
    server: Server
    proxy: CountingProxy
    paths: list[str]

    @contextmanager
    def begun(self, *options: str, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
        """A push of all paths; `before`: words before its own."""
        options = ("--to", f"{self.proxy.url}/main", *options)
        words = push.command(self.builder, self.server, *options, *self.paths[SMALL - 1 :])
        with (
            self._file.open("wb") as out,
            subprocess.Popen(
                [*before, *words], env=self.builder.environment, stdout=out, stderr=subprocess.STDOUT
            ) as pushing,
        ):
            try:
                yield pushing
            finally:
                pushing.kill()

    def stopped(self, after: int, number: int, before: Sequence[str] = ()) -> int:
        """The status of a push that gets this signal when so many more bytes have been sent."""
        with self.begun(before=before) as pushing:
            self.proxy.trouble(after, partial(pushing.send_signal, number))
            status = pushing.wait(push.PATIENCE)
        self.proxy.settle()
        return status

    def end(self, pushing: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
        """All that is told by a push that comes to a good end, the summary last."""
        assert pushing.wait(push.PATIENCE) == 0, self.told
        return [json.loads(line) for line in self.told.splitlines()]

    @property
    def parts(self) -> list[str]:
        """Those that the server has, of NARs that it was not asked to complete."""
        files = (file.name.split(".") for file in self.server.data_dir.glob("objects/~uploads/main/*/*.*.*"))
        return [number for upload, number, _ in files if upload and upload not in self.proxy.completed]

    @property
    def told(self) -> str:
        """By the last push."""
        return self._file.read_text()

    @property
    def _file(self) -> Path:
        return self.server.folder / "told"

    def check(self, lost: int) -> None:
        """All is there and whole; what was acknowledged was not sent again, and at most `lost` bodies were not."""
        verify = self.server.command("verify", "--contents", "--json")
        done = subprocess.run(
            verify, check=False, env=self.server.environment, capture_output=True, text=True, timeout=push.PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert push.push(self.builder, self.server, *self.paths)["present"] == len(self.paths)
        left = [file.name for file in self.server.data_dir.glob("objects/~uploads/**/*.*")]
        assert not [name for name in left if not name.startswith(".incoming-")], "parts are left behind"
        acknowledged: dict[str, int] = {}
        for number, body in enumerate(self.proxy.bodies):
            again = [name for name in body.names if acknowledged.get(name, number) < number]
            assert not again, "acknowledged, and sent again"
            if body.acknowledged_at is not None:
                acknowledged |= dict.fromkeys(body.names, body.acknowledged_at - 1)
        assert len(self.proxy.unacknowledged) <= lost
        sent_again = sum(body.size for body in self.proxy.unacknowledged)
        assert self.proxy.sent - sent_again < 1.05 * (TOTAL + 2 * MIB)


@pytest.fixture
def scene(builder: Nix, make_server: StartServer) -> Iterator[Scene]:
    environment = {"CACHESRV_SERVER__STORE_DIR": builder.store_dir, "CACHESRV_UPLOADS__PART_SIZE": str(PART)}
    server = make_server(environment=environment).start()
    contents = random.Random(1)
    small = builder.evaluate(MANY % ("small", SMALL))
    single = builder.add("single", b"".join(contents.randbytes(1000) * 5 for _ in range(400)))
    large = [builder.add(f"large-{size}", contents.randbytes(size)) for size in LARGE]
    with CountingProxy(server.url) as proxy:
        yield Scene(builder, server, proxy, [*small, single, *large])


@pytest.mark.parametrize(("number", "seed"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 3)])
def test_the_uploader_is_stopped(scene: Scene, number: signal.Signals, seed: int) -> None:
    places = random.Random(seed)
    times = 0
    while times < 3 or not scene.parts:
        times += 1
        status = scene.stopped(places.randrange(1, TOTAL // 5), number)
        assert status == (-9 if number == signal.SIGKILL else 130), scene.told
    there = len(scene.parts)
    lost = len(scene.proxy.unacknowledged)
    assert lost, "nothing was cut short: this shows nothing"
    with scene.begun("--level", "9") as pushing:
        told = scene.end(pushing)
    assert len(scene.proxy.unacknowledged) == lost
    resumed = {event["path"]: event for event in told if event["event"] == "resumed"}
    assert all(0 < event["parts"] <= event["all_parts"] for event in resumed.values())
    assert sum(event["parts"] for event in resumed.values()) >= there
    assert sum(event["resumed_bytes"] for event in resumed.values()) == told[-1]["resumed_bytes"]
    # that of the journal: nobody else knows with which one they were begun
    levels = {event["path"]: event["level"] for event in told if event["event"] == "stored"}
    assert {levels[path] for path in resumed} == {3}
    journal = scene.builder.folder / ".local/state/cachesrv/transfers-1.sqlite"
    assert journal.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(journal)) as db:
        assert db.execute("SELECT count(*) FROM transfers UNION SELECT count(*) FROM parts").fetchall() == [(0,)]
    scene.check(times * AT_ONCE)


def test_connections_are_cut(scene: Scene) -> None:
    places = random.Random(4)
    for _ in range(3):
        scene.proxy.trouble(places.randrange(1, TOTAL // 3), scene.proxy.cut)
    with scene.begun() as pushing:
        scene.end(pushing)
    assert not scene.proxy.pending
    assert scene.proxy.unacknowledged
    scene.check(3 * AT_ONCE)


@pytest.mark.parametrize(("end", "seed"), [(Server.kill, 5), (Server.stop, 6)], ids=["SIGKILL", "SIGTERM"])
def test_the_server_is_restarted(scene: Scene, end: Callable[[Server], object], seed: int) -> None:
    places = random.Random(seed)
    reached = [threading.Event(), threading.Event()]
    for event in reached:
        scene.proxy.trouble(places.randrange(1, TOTAL // 2), event.set)
    with scene.begun() as pushing:
        for event in reached:
            until(partial(_is_set_or_over, event, pushing), "nothing is sent")
            end(scene.server)
            scene.server.start()
        scene.end(pushing)
    assert not scene.proxy.pending
    scene.check(2 * AT_ONCE)


def put_token(server: Server, name: str, file: Path) -> None:
    """A new one, as whoever renews tokens does it: the file is never without one."""
    new = file.with_name(name)
    on_tokens(server, "create", name, "--permission", "push", "--output", str(new))
    new.replace(file)


def on_tokens(server: Server, *words: str) -> None:
    command = [*CACHESRV, "token", *words, "--data-dir", str(server.data_dir)]
    subprocess.run(command, check=True, env=server.environment, capture_output=True)


@contextmanager
def token_ends(scene: Scene, file: Path, name: str, renewed: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A push that sleeps in the middle of bodies, and whose token ends then. The server is started anew: it remembers
    tokens for a while.
    """
    asleep = threading.Event()
    with scene.begun("--token-file", str(file)) as pushing:

        def sleep() -> None:
            pushing.send_signal(signal.SIGSTOP)
            asleep.set()

        scene.proxy.trouble(TOTAL // 4, sleep)
        until(partial(_is_set_or_over, asleep, pushing), "nothing is sent")
        on_tokens(scene.server, "revoke", name)
        if renewed:
            put_token(scene.server, renewed, file)
        scene.server.kill()
        scene.server.start()
        pushing.send_signal(signal.SIGCONT)
        yield pushing


def test_the_token_ends(scene: Scene, tmp_path: Path) -> None:
    """The push says so; with another one it goes on where it was, and with a third that comes into its file."""
    file = tmp_path / "token"
    put_token(scene.server, "first", file)
    with token_ends(scene, file, "first") as pushing:
        assert pushing.wait(push.PATIENCE) == 1
    scene.proxy.settle()
    assert f"does not accept the token from {file}" in scene.told
    assert "Traceback" not in scene.told
    there = len(scene.parts)
    put_token(scene.server, "second", file)
    with token_ends(scene, file, "second", renewed="third") as pushing:
        told = scene.end(pushing)
    assert any("has been renewed" in event.get("error", "") for event in told)
    assert sum(event["parts"] for event in told if event["event"] == "resumed") >= there > 0
    scene.check(3 * AT_ONCE)


def _is_set_or_over(event: threading.Event, pushing: subprocess.Popen[bytes]) -> bool:
    return event.is_set() or pushing.poll() is not None


def test_the_disk_of_the_uploader_is_full(scene: Scene, tmp_path: Path) -> None:
    """From the middle of a push on, with the store and all that belongs to the user on it."""
    places = random.Random(7)
    machine = str(scene.builder.folder)
    with small_disk(tmp_path / "disk", "64m") as disk:
        on_it = str(disk.inside / "machine")
        subprocess.run([*disk.entering, "cp", "-a", machine, on_it], check=True)
        subprocess.run([*disk.entering, "mount", "--bind", on_it, machine], check=True)
        scene.proxy.trouble(places.randrange(1, TOTAL // 3), disk.fill)
        times = 0
        while times < 2 or not scene.parts:
            times += 1
            assert scene.stopped(places.randrange(1, TOTAL // 5), signal.SIGKILL, disk.entering) == -9
            assert disk.free == 0
        there = len(scene.parts)
        with scene.begun(before=disk.entering) as pushing:
            told = scene.end(pushing)
        assert disk.free == 0
    assert sum(event["parts"] for event in told if event["event"] == "resumed") >= there
    assert "is full" in scene.told
    scene.check(times * AT_ONCE)
