"""NARs: small ones by the request, large ones by the byte."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import common
import data
from common import NGINX, Keys, Peer, Question

if TYPE_CHECKING:
    import argparse

    from common import Run
    from data import Data

LARGE = 256 * data.MIB


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--connections", type=int, default=32, help="for NARs of up to 1 MiB")
    parser.add_argument("--large-connections", type=int, default=4, help="for the others")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(data.NAR_SETS), choices=list(data.NAR_SETS))
    options = parser.parse_args()
    print(common.machine(), end="\n\n")
    cache = data.nars(options.data)
    found = []
    with ExitStack() as stack:
        ours = stack.enter_context(common.cachesrv(cache, options.server_core))
        ways = [
            stack.enter_context(common.nginx(cache, options.server_core, files=5000, sendfile=sendfile))
            for sendfile in (True, False)
        ]
        others = common.further_peers(options)
        check(cache, [ours, *ways, *others])
        for size in options.sizes:
            measure = partial(ask, options, cache, size)
            peers = [ours, faster(ways, measure), *others]
            large = size >= data.MIB
            name, unit = f"NAR of {named(size)}", "MiB/s" if large else "req/s"
            value = (lambda run: run.throughput) if large else (lambda run: run.rate)
            found += common.rows(common.ask(Question(name, measure, value, unit), peers, options.rounds))
        memory = ours.memory()
    print(common.table(common.COLUMNS, found, markdown=options.markdown), end="\n\n")
    print(f"cachesrv: {memory.private:.0f} MiB of its own, {memory.peak:.0f} MiB resident at most")


def faster(ways: list[Peer], measure: partial[Run]) -> Peer:
    """nginx in the one of its two ways to send a file that is faster with these."""
    rates = [measure(way, seconds=1).rate for way in ways]
    best = max(range(len(ways)), key=rates.__getitem__)
    return Peer(f"{NGINX}, sendfile {'off' if best else 'on'}", ways[best].url, ways[best].processes)


def named(size: int) -> str:
    return f"{size // data.MIB} MiB" if size >= data.MIB else f"{size // data.KIB} KiB"


def check(cache: Data, peers: list[Peer]) -> None:
    """The servers have the same; afterwards all of it is in memory."""
    for size in data.NAR_SETS:
        for key in cache.keys(data.nar_keys(cache, size), data.NAR_SETS[size]):
            content = (cache.objects / data.CACHE / "nar" / f"{key}.nar").read_bytes()
            if size == LARGE:
                continue
            for peer in peers:
                status, body = common.fetch(peer.url, f"/nar/{key}.nar")
                if status != 200 or sha256(body).digest() != sha256(content).digest():
                    raise SystemExit(f"{peer.name} has another NAR {key} ({status}, {len(body)} bytes)")


def ask(options: argparse.Namespace, cache: Data, size: int, peer: Peer, *, seconds: float = 0) -> Run:
    return common.load(
        peer,
        options.load_core,
        connections=options.connections if size < LARGE else options.large_connections,
        seconds=seconds or options.seconds,
        suffix="/nar/*.nar",
        keys=[Keys(data.nar_keys(cache, size))],
    )


if __name__ == "__main__":
    main()
