"""Two workers against one, where the load runs on the same two cores, and against one that has a core for itself."""

from __future__ import annotations

from contextlib import ExitStack

import common
import data
from common import Keys, Peer, Question, Run


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--paths", type=int, default=10_000, help="how many there are")
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()
    print(common.machine(), end="\n\n")
    cache = data.paths(options.data, options.paths)
    both = f"{options.server_core},{options.load_core}"
    setups = {
        "1 worker, a core for itself": (1, options.server_core, options.load_core),
        "1 worker, two shared cores": (1, both, both),
        "2 workers, two shared cores": (2, both, both),
    }
    with ExitStack() as stack:
        peers = [
            stack.enter_context(common.cachesrv(cache, cores, workers=workers, name=name))
            for name, (workers, cores, _) in setups.items()
        ]

        def hits(peer: Peer) -> Run:
            return common.load(
                peer,
                setups[peer.name][2],
                connections=options.connections,
                seconds=options.seconds,
                suffix="/*.narinfo",
                keys=[Keys(cache.present)],
            )

        found = list(common.rows(common.ask(Question("hits", hits), peers, options.rounds), of=peers[-1].name))
    print(common.table(common.COLUMNS, found, markdown=options.markdown))


if __name__ == "__main__":
    main()
