"""What does it cost that objects lie in a bucket? Lookups through the chain, NARs by redirect and through the server.

    python -m bench.s3 [--only lookups redirect nars cached] [--markdown]

The bucket is that of the gateway that the tests use too (radosgw, with objects in memory), on this machine and on all
of its cores. What it answers by itself, to clients that need no credentials, is what cachesrv is compared with, and for
NARs also what comes by way of a server that does the least (`bench.relay`), on the core that cachesrv has too. Those
from the disk cache are compared with those that lie in files. Requests to the bucket are counted for each question.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench import common, data
from bench.common import OURS, Keys, Peer, Question, Run
from tests.radosgw import shared_gateway
from tests.samples import Sample
from tests.system.server import Server
from tests.system.stored import Bucket

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from bench.common import Answers
    from tests.radosgw import Gateway

QUESTIONS = ("lookups", "redirect", "nars", "cached")
PATHS = 500
LARGE, NUMBER = 64 * data.MIB, 8
"""Bytes of a NAR, and how many of them are fetched; so many that no answer is in anybody's memory."""
GATEWAY, RELAY, FILES, REDIRECT = "the gateway", "a bare relay", "cachesrv, from files", "cachesrv, by redirect"
COSTLESS = {GATEWAY, RELAY, FILES}
"""Whose requests to the bucket are not counted."""
COLUMNS = (*common.COLUMNS, "to the bucket")


@dataclass
class Site:
    """A bucket with paths and NARs, the servers that serve them, and the data of a server that has published them."""

    folder: Path
    bucket: Bucket
    samples: list[Sample]
    nars: list[Sample]
    servers: dict[str, Server] = field(default_factory=dict)

    def bucket_url(self, port: int) -> str:
        """The cache, where the gateway or a relay listens on this port."""
        return f"http://127.0.0.1:{port}/{self.bucket.name}/{self.bucket.prefix}/main"

    @property
    def data(self) -> Path:
        return self.folder / "made" / "data"

    @property
    def present(self) -> Path:
        return self.folder / "present.keys"

    @property
    def nar_keys(self) -> Path:
        return self.folder / "nars.keys"


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--connections", type=int, default=32, help="for lookups and redirects")
    parser.add_argument("--large-connections", type=int, default=2, help="for NARs")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    options = parser.parse_args()
    print(common.machine(), end="\n\n")
    with tempfile.TemporaryDirectory() as folder, shared_gateway(Path(folder) / "gateway") as gateway:
        site = make(Path(folder), gateway)
        found: list[Sequence[str]] = []
        for name in options.only:
            for question, peers in {"lookups": lookups, "redirect": redirects, "nars": nars, "cached": cached}[name](
                options, site
            ):
                with serving(options, site, gateway, peers) as running:
                    found += asked(options, site, question, running)
    print(common.table(COLUMNS, found, markdown=options.markdown))


def make(folder: Path, gateway: Gateway) -> Site:
    """A bucket that anybody may read, with all that is asked for."""
    name = gateway.make_bucket()
    samples = [Sample(f"path-{number}", b"%d" % number) for number in range(PATHS)]
    nars = [Sample(f"nar-{number}", random.Random(number).randbytes(LARGE)) for number in range(NUMBER)]
    site = Site(folder, Bucket(gateway, name, "cache", folder, mode="proxy"), samples, nars)
    statement = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    resources = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
    policy = {"Version": "2012-10-17", "Statement": [statement | {"Resource": resources}]}
    with closing(gateway.client()) as client:
        client.put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
    server = Server(folder / "made", stored=site.bucket).start()
    publish(server, [*samples, *nars])
    server.stop()
    site.present.write_text("".join(sample.path.hash_part for sample in samples))
    site.nar_keys.write_text("".join(sample.nar_name.removesuffix(".nar") for sample in samples))
    return site


@contextmanager
def serving(options: argparse.Namespace, site: Site, gateway: Gateway, names: Sequence[str]) -> Iterator[list[Peer]]:
    """Those of the servers that are asked for, each new."""
    with ExitStack() as stack:
        peers = []
        for name in names:
            if name == GATEWAY:
                peers.append(Peer(name, site.bucket_url(gateway.port)))
                continue
            if name == RELAY:
                relay = stack.enter_context(relaying(options, site, gateway))
                peers.append(Peer(name, site.bucket_url(int(relay.stdout.readline())), [relay.pid]))  # type: ignore[union-attr]  # a pipe
                continue
            server = stack.enter_context(started(options, site, name))
            site.servers[name] = server
            peers.append(Peer(name, server.main, [server.process.pid]))
        yield peers


@contextmanager
def relaying(options: argparse.Namespace, site: Site, gateway: Gateway) -> Iterator[subprocess.Popen[str]]:
    command = ["taskset", "-c", options.server_core, sys.executable, "-m", "bench.relay"]
    with subprocess.Popen(
        [*command, str(gateway.port), str(site.folder)], cwd=common.ROOT, stdout=subprocess.PIPE, text=True
    ) as relay:
        try:
            yield relay
        finally:
            relay.kill()


@contextmanager
def started(options: argparse.Namespace, site: Site, name: str) -> Iterator[Server]:
    """New, and with nothing in its disk cache."""
    folder = Path(tempfile.mkdtemp(dir=site.folder))
    if name != FILES:
        shutil.copytree(site.data, folder / "data")
    environment = {"CACHESRV_CACHE__0__AUTHORITY": "bucket", "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "20 GiB"}
    if name == REDIRECT:
        environment |= {"CACHESRV_DELIVERY__MODE": "redirect", "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "0"}
    server = Server(folder, stored=None if name == FILES else site.bucket, environment=environment)
    cores = {int(core) for core in options.server_core.split(",")}
    try:
        server.start(preexec_fn=partial(os.sched_setaffinity, 0, cores))
        if name == FILES:
            publish(server, site.nars)
        yield server
    finally:
        server.dispose()


def publish(server: Server, samples: Sequence[Sample]) -> None:
    for sample in samples:
        assert server.pusher.put(sample.nar_url, sample.file).status == 204
        assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204


def asked(options: argparse.Namespace, site: Site, question: Question, peers: list[Peer]) -> Iterator[Sequence[str]]:
    """The rows of a question, each with the requests to the bucket that one of its requests costs."""
    before = {peer.name: requests(site, peer) for peer in peers}
    answers: Answers = common.ask(question, peers, options.rounds)
    for peer, row in zip(peers, common.rows(answers), strict=True):
        made = sum(run.requests for run in answers.runs[peer.name])
        cost = "" if peer.name in COSTLESS else f"{(requests(site, peer) - before[peer.name]) / made:.2f}"
        yield (*row, cost)


def requests(site: Site, peer: Peer) -> float:
    """How many the bucket got from a server so far."""
    if peer.name in {GATEWAY, RELAY}:
        return 0
    lines = site.servers[peer.name].client().get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("cachesrv_bucket_requests_total "))


def lookups(options: argparse.Namespace, site: Site) -> Iterator[tuple[Question, list[str]]]:
    absent = site.folder / "absent.keys"
    absent.write_text("".join(data.hash_part("absent", number) for number in range(PATHS)))
    for name, keys in (("hits", Keys(site.present)), ("absences", Keys(absent, there=False))):
        yield Question(f"{name} in the index", partial(known, options, keys)), [OURS]
    yield Question("first questions", partial(unknown, options)), [OURS, GATEWAY]


def known(options: argparse.Namespace, keys: Keys, peer: Peer) -> Run:
    """They are asked for before, so that they are."""
    text = keys.file.read_text()
    for start in range(0, len(text), keys.length):
        common.fetch(peer.url, f"/{text[start : start + keys.length]}.narinfo")
    return load(options, peer, "/*.narinfo", keys)


def unknown(options: argparse.Namespace, peer: Peer) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return load(options, peer, "/*.narinfo", Keys(data.unknown(Path(folder)), step=1, there=False))


def redirects(options: argparse.Namespace, site: Site) -> Iterator[tuple[Question, list[str]]]:
    """Small NARs, so that what is measured is the answer and not the transfer."""
    keys = Keys(site.nar_keys, length=52, step=52)
    yield Question("redirects", lambda peer: load(options, peer, "/nar/*.nar", keys)), [REDIRECT]


def load(options: argparse.Namespace, peer: Peer, suffix: str, keys: Keys) -> Run:
    return common.load(
        peer,
        options.load_core,
        connections=options.connections,
        seconds=options.seconds,
        suffix=suffix,
        keys=[keys],
    )


def nars(options: argparse.Namespace, site: Site) -> Iterator[tuple[Question, list[str]]]:
    """Each is fetched once, by a server that does not have it."""

    def measure(peer: Peer) -> Run:
        if peer.name == OURS:
            site.servers[peer.name].forget_nars()
        return fetch(options, site, peer)

    yield in_mib("NARs of 64 MiB from the bucket", measure), [OURS, GATEWAY, RELAY]


def cached(options: argparse.Namespace, site: Site) -> Iterator[tuple[Question, list[str]]]:
    def measure(peer: Peer) -> Run:
        fetch(options, site, peer)
        return fetch(options, site, peer, times=4)

    yield in_mib("NARs of 64 MiB from the disk cache", measure), [OURS, FILES]


def in_mib(name: str, measure: partial[Run] | object) -> Question:
    return Question(name, measure, lambda run: run.throughput, "MiB/s")  # type: ignore[arg-type]


def fetch(options: argparse.Namespace, site: Site, peer: Peer, *, times: int = 1) -> Run:
    """All of the large NARs, one after the other on each of several connections."""
    urls = [f"{peer.url}/nar/{nar.nar_name}" for nar in site.nars] * times
    command = ["taskset", "-c", options.load_core, "curl", "--fail", "--silent", "--parallel"]
    command += ["--parallel-max", str(options.large_connections), "--write-out", "%{size_download}\\n"]
    for url in urls:
        command += ["--output", "/dev/null", url]
    before, begun = peer.processor(), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, used = time.monotonic() - begun, peer.processor() - before
    received = sum(map(int, done.stdout.split()))
    if received != times * sum(len(nar.file) for nar in site.nars):
        raise SystemExit(f"{peer.name} sent {received} bytes")
    each = seconds / len(urls) * options.large_connections * 1000
    return Run(len(urls), seconds, received, 0, each, each, used)


if __name__ == "__main__":
    main()
