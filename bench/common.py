"""What all benches share: servers on a core of their own, load from another, peers by turns, medians of ratios.

A ratio is that of two measurements of the same round, so that what disturbs the machine for a while disturbs both.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from data import Data

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS, NGINX, NGINX_DEBIAN = "cachesrv", "nginx, tuned", "nginx of Debian"
MIB = 2**20

_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE = 120


@dataclass(frozen=True)
class Run:
    """One measurement; latencies in milliseconds, `processor` in seconds of the server."""

    requests: int
    seconds: float
    received: int
    refused: int
    p50: float
    p99: float
    processor: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    @property
    def throughput(self) -> float:
        """MiB a second."""
        return self.received / self.seconds / MIB


@dataclass
class Peer:
    """A server: the URL of its cache, and its processes, where they are ours."""

    name: str
    url: str
    processes: list[int] = field(default_factory=list)

    def processor(self) -> float:
        """Seconds that its processes have used."""
        return sum(_processor(pid) for pid in _family(self.processes))

    def memory(self) -> Memory:
        return Memory.of(_family(self.processes))


@dataclass(frozen=True)
class Memory:
    """MiB: what the processes have for themselves (of all of them), and the peak of resident memory of the largest."""

    private: float
    peak: float

    @classmethod
    def of(cls, pids: Iterable[int]) -> Memory:
        private, peak = 0, 0
        for pid in pids:
            rollup = _proc_fields(Path(f"/proc/{pid}/smaps_rollup"))
            private += rollup.get("Private_Dirty", 0) + rollup.get("Private_Clean", 0)
            peak = max(peak, _proc_fields(Path(f"/proc/{pid}/status")).get("VmHWM", 0))
        return cls(private / 1024, peak / 1024)


def resident_beyond(pid: int, mapped: str) -> float:
    """MiB of resident memory of a process, without those of the file whose name ends so."""
    resident, in_file, inside = 0, 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.endswith(mapped)
        elif words[0] == "Rss:":
            resident += int(words[1])
            in_file += int(words[1]) if inside else 0
    return (resident - in_file) / 1024


def _proc_fields(path: Path) -> dict[str, int]:
    """Fields of proc(5) that are in kB."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _processor(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(stat[11]) + int(stat[12])) / _TICKS


def _family(pids: Iterable[int]) -> list[int]:
    """The processes and their children."""
    found: list[int] = []
    for pid in pids:
        children = "".join(task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children"))
        found += [pid, *_family(map(int, children.split()))]
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def wait_until_answered(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Return when the server answers, whatever it says."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fetch(url, "/nix-cache-info")
        except OSError:
            if time.monotonic() > deadline or (process and process.poll() is not None):
                raise
            time.sleep(0.01)
        else:
            return


def fetch(url: str, path: str) -> tuple[int, bytes]:
    """Status and body of `url` with `path` behind it."""
    parts = urlsplit(url)
    assert parts.hostname
    connection = HTTPConnection(parts.hostname, parts.port or 80, timeout=_PATIENCE)
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers={"Accept": "*/*"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextmanager
def running(command: Sequence[str], cores: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process on these cores, that is told to end at the end."""
    with log.open("ab") as stream:
        process = subprocess.Popen(["taskset", "-c", cores, *command], stdout=stream, stderr=stream, cwd=ROOT)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def cachesrv(data: Data, cores: str, *, workers: int = 1, name: str = OURS) -> Iterator[Peer]:
    port = free_port()
    command = [sys.executable, "-m", "cachesrv", "serve", "--data-dir", str(data.folder)]
    command += ["--listen", f"127.0.0.1:{port}", "--workers", str(workers)]
    with running(command, cores, data.folder / "log") as process:
        peer = Peer(name, f"http://127.0.0.1:{port}/main", [process.pid])
        wait_until_answered(peer.url, process)
        yield peer


@contextmanager
def nginx(data: Data, cores: str, *, files: int, sendfile: bool, name: str = NGINX) -> Iterator[Peer]:
    """nginx, tuned for this or as Debian has it: `files` are kept open, as far as this process may open so many."""
    port = free_port()
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "user": "user root;" if os.geteuid() == 0 else "",
            "folder": folder,
            "port": port,
            "objects": data.objects,
            "allowed": allowed,
            "files": max(1000, min(files, allowed - 3000)),
            "sendfile": "on" if sendfile else "off",
        }
        text = (HERE / ("nginx-debian.conf" if name == NGINX_DEBIAN else "nginx.conf")).read_text()
        for word, value in settings.items():
            text = text.replace(f"@{word}@", str(value))
        config = Path(folder) / "nginx.conf"
        config.write_text(text)
        command = [shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config), "-e", f"{folder}/errors"]
        with running(command, cores, Path(folder) / "log") as process:
            peer = Peer(name, f"http://127.0.0.1:{port}/main", [process.pid])
            wait_until_answered(peer.url, process)
            yield peer


@dataclass(frozen=True)
class Keys:
    """A source of keys for requests: `share` of those go to it. `there`: what is asked for by them is there."""

    file: Path
    length: int = 32
    step: int = 32
    share: float = 1.0
    there: bool = True


def load(peer: Peer, core: str, *, connections: int, seconds: float, suffix: str, keys: Sequence[Keys]) -> Run:
    """Ask a server as fast as it answers, on so many connections."""
    parts = urlsplit(peer.url)
    command = ["taskset", "-c", core, "wrk", "--threads", "1", "--connections", str(connections)]
    command += [
        "--duration",
        f"{seconds:g}s",
        "--timeout",
        "30s",
        "--script",
        str(HERE / "lookups.lua"),
        peer.url,
        "--",
    ]
    prefix, ending = suffix.split("*")
    command += [str(time.time_ns() % 2**31), parts.path.rstrip("/") + prefix, ending]
    for source in keys:
        command += [str(source.file), str(source.length), str(source.step), str(source.share)]
    before = peer.processor()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    used = peer.processor() - before
    if done.returncode or "RESULT" not in done.stdout:
        raise SystemExit(f"wrk failed:\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    shares = [source.share for source in keys[:-1]]
    shares.append(1 - sum(shares))
    expected = sum(share for share, source in zip(shares, keys, strict=True) if not source.there)
    if abs(found["refused"] - expected * found["requests"]) > 0.02 * found["requests"]:
        raise SystemExit(f"{peer.name} refused {found['refused']} of {found['requests']} requests")
    if found["failed"]:
        print(f"  {peer.name}: {found['failed']} requests without an answer", file=sys.stderr)
    return Run(found["requests"], found["seconds"], found["bytes"], found["refused"], found["p50"], found["p99"], used)


@dataclass(frozen=True)
class Question:
    """What is measured; `measure` asks one peer once."""

    name: str
    measure: Callable[[Peer], Run]
    value: Callable[[Run], float] = lambda run: run.rate
    unit: str = "req/s"


@dataclass
class Answers:
    """All runs of one question, by peer, in order of rounds."""

    question: Question
    runs: dict[str, list[Run]]

    def median(self, peer: str, value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, self.runs[peer]))

    def ratios(self, peer: str, base: str, value: Callable[[Run], float]) -> list[float]:
        pairs = zip(self.runs[peer], self.runs[base], strict=True)
        return [value(ours) / value(theirs) for ours, theirs in pairs]


def ask(question: Question, peers: Sequence[Peer], rounds: int) -> Answers:
    """Ask all peers, by turns, each time in another order."""
    runs: dict[str, list[Run]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        for peer in sorted(peers, key=lambda peer: (peers.index(peer) + number) % len(peers)):
            runs[peer.name].append(question.measure(peer))
            print(
                f"  {question.name}, {number + 1}/{rounds}, {peer.name}: "
                f"{question.value(runs[peer.name][-1]):,.0f} {question.unit}",
                file=sys.stderr,
            )
    return Answers(question, runs)


COLUMNS = ("question", "server", "median", "ratio", "spread", "p50 ms", "p99 ms", "µs CPU/req")


def rows(answers: Answers, *, of: str = OURS) -> Iterator[tuple[str, ...]]:
    """One row a server; the ratio is that of the one called `of` to it."""
    question = answers.question
    for peer in answers.runs:
        ratio = spread = ""
        if peer != of and of in answers.runs:
            ratios = answers.ratios(of, peer, question.value)
            ratio, spread = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"
        processor = answers.median(peer, lambda run: run.processor / max(1, run.requests) * 1e6)
        yield (
            question.name if peer == next(iter(answers.runs)) else "",
            peer,
            f"{answers.median(peer, question.value):,.0f} {question.unit}",
            ratio,
            spread,
            f"{answers.median(peer, lambda run: run.p50):.2f}",
            f"{answers.median(peer, lambda run: run.p99):.2f}",
            f"{processor:.1f}" if processor else "",
        )


def table(columns: Sequence[str], found: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """The rows below their columns, for a terminal or for README.md."""
    widths = [max(len(row[place]) for row in [columns, *found]) for place in range(len(columns))]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in [columns, *found]]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Where this was measured, and with what."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in info if line.startswith("model name")), platform.machine())
    memory = _proc_fields(Path("/proc/meminfo"))["MemTotal"] / MIB
    nginx_version = subprocess.run(["nginx", "-v"], check=False, capture_output=True, text=True).stderr
    wrk_version = subprocess.run(["wrk", "-v"], check=False, capture_output=True, text=True).stdout
    return (
        f"{dt.datetime.now(tz=dt.UTC).date()}: {os.cpu_count()} cores of {model}, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, aiohttp {version('aiohttp')}, "
        f"nginx {nginx_version.strip().rpartition('/')[2]}, {' '.join(wrk_version.split()[:2])}"
    )


def arguments(text: str) -> argparse.ArgumentParser:
    """What all benches take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(tempfile.gettempdir()) / "cachesrv-bench",
        help="where the caches lie that are measured; made once; on a disk",
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured")
    parser.add_argument("--seconds", type=int, default=5, help="how long each measurement takes")
    parser.add_argument("--server-core", default="0", help="where servers run, as taskset(1) takes it")
    parser.add_argument("--load-core", default="1", help="where the load generator runs")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a further server with the same content: the URL of its cache",
    )
    parser.add_argument("--markdown", action="store_true", help="print tables for README.md")
    return parser


def further_peers(options: argparse.Namespace) -> list[Peer]:
    return [Peer(*text.split("=", 1)) for text in options.peer]
