"""Narinfo lookups: hits, misses, nine misses for a hit, and paths that nobody has asked for before."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import common
import data
from common import Keys, Peer, Question

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from common import Run
    from data import Data

TARGET = "/*.narinfo"
SHARE_OF_MISSES = 0.9


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--paths", type=int, nargs="+", default=[10_000, 1_000_000], help="how many there are")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--only", nargs="+", choices=["hits", "misses", "mix", "unknown", "sizes"])
    options = parser.parse_args()
    wanted = options.only or ["hits", "misses", "mix", "unknown", "sizes"]
    print(common.machine(), end="\n\n")
    for number in options.paths:
        if set(wanted) != {"sizes"}:
            compare(options, number, wanted)
    if "sizes" in wanted and len(options.paths) > 1:
        sizes(options)


def compare(options: argparse.Namespace, number: int, wanted: list[str]) -> None:
    """All servers with the same paths."""
    # Beyond this, files for a file server would take more than they are worth.
    with_files = number <= 2_000_000
    cache = data.paths(options.data, number, files=with_files)
    with ExitStack() as stack:
        ours = stack.enter_context(common.cachesrv(cache, options.server_core))
        peers = [ours]
        if with_files:
            sendfile = faster_with_sendfile(options, cache)
            for name in (common.NGINX, common.NGINX_DEBIAN):
                running = common.nginx(cache, options.server_core, files=number, sendfile=sendfile, name=name)
                peers.append(stack.enter_context(running))
        peers += common.further_peers(options)
        check(cache, peers)
        for connections in options.connections:
            found = [
                row
                for question in questions(options, cache, connections, wanted)
                for row in common.rows(common.ask(question, peers, options.rounds))
            ]
            print(f"{number:,} paths, {connections} connections\n")
            print(common.table(common.COLUMNS, found, markdown=options.markdown), end="\n\n")
        for peer in peers:
            memory = peer.memory()
            print(f"{peer.name}: {memory.private:.0f} MiB of its own, {memory.peak:.0f} MiB resident at most")
        print()


def faster_with_sendfile(options: argparse.Namespace, cache: Data) -> bool:
    """In which of its two ways to send a file nginx is faster here."""
    rates: dict[bool, float] = {}
    for sendfile in (True, False):
        with common.nginx(cache, options.server_core, files=cache.number, sendfile=sendfile) as peer:
            ask(options, 32, [Keys(cache.present)], peer, seconds=1)
            rates[sendfile] = ask(options, 32, [Keys(cache.present)], peer, seconds=2).rate
    print(f"nginx: {rates[True]:,.0f} hits a second with sendfile, {rates[False]:,.0f} without\n")
    return rates[True] > rates[False]


def check(cache: Data, peers: list[Peer]) -> None:
    """The servers have the same; asking for what is absent also makes it known to be."""
    keys = cache.keys(cache.present, 200)
    for key in keys:
        answers = {common.fetch(peer.url, f"/{key}.narinfo") for peer in peers}
        if len(answers) != 1 or next(iter(answers))[0] != 200:
            raise SystemExit(f"the servers differ on {key}: {answers}")
    for peer in peers:
        for key in cache.keys(cache.absent, data.ABSENT):
            if common.fetch(peer.url, f"/{key}.narinfo")[0] != 404:
                raise SystemExit(f"{peer.name} has {key}, that nobody has")


def questions(options: argparse.Namespace, cache: Data, connections: int, wanted: list[str]) -> Iterator[Question]:
    found, absent = Keys(cache.present), Keys(cache.absent, there=False)
    if "hits" in wanted:
        yield Question("hits", partial(ask, options, connections, [found]))
    if "misses" in wanted:
        yield Question("misses", partial(ask, options, connections, [absent]))
    if "mix" in wanted:
        mixed = [replace(absent, share=SHARE_OF_MISSES), found]
        yield Question("9 misses, 1 hit", partial(ask, options, connections, mixed))
    if "unknown" in wanted:
        yield Question("never asked before", partial(ask_unknown, options, connections))


def ask(options: argparse.Namespace, connections: int, keys: list[Keys], peer: Peer, *, seconds: float = 0) -> Run:
    seconds = seconds or options.seconds
    return common.load(peer, options.load_core, connections=connections, seconds=seconds, suffix=TARGET, keys=keys)


def ask_unknown(options: argparse.Namespace, connections: int, peer: Peer) -> Run:
    return ask(options, connections, [Keys(data.unknown(options.data), step=1, there=False)], peer)


def sizes(options: argparse.Namespace) -> None:
    """The same server with few and with many paths."""
    caches = [data.paths(options.data, number, files=False) for number in options.paths]
    with ExitStack() as stack:
        peers = [
            stack.enter_context(common.cachesrv(cache, options.server_core, name=f"{cache.number:,} paths"))
            for cache in caches
        ]
        by_name = {peer.name: cache for peer, cache in zip(peers, caches, strict=True)}

        def hits(peer: Peer) -> Run:
            return ask(options, 32, [Keys(by_name[peer.name].present)], peer)

        for peer in peers:
            hits(peer)
        found = list(common.rows(common.ask(Question("hits", hits), peers, options.rounds), of=peers[-1].name))
    print("the same with few and with many paths, 32 connections\n")
    print(common.table(common.COLUMNS, found, markdown=options.markdown), end="\n\n")


if __name__ == "__main__":
    main()
