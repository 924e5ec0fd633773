"""A large closure that is all there: known after a handful of requests, whatever asks."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.nix.base32 import encode
from cachesrv.nix.nar_writer import dump
from tests.system.push import push

if TYPE_CHECKING:
    from tests.system.nix import Nix
    from tests.system.server import Server

NUMBER = 10_000
CONTENTS = 50


def plant(nix: Nix) -> str:
    """Paths of which each refers to two others; the one that needs them all."""
    paths = [f"{nix.store_dir}/{encode(sha256(b'%d' % n).digest()[:20])}-path-{n}" for n in range(NUMBER)]
    nix.root.mkdir(parents=True, exist_ok=True)
    registration: list[str] = []
    nars: dict[int, tuple[str, int]] = {}
    for number, path in enumerate(paths):
        content = number % CONTENTS
        file = nix.root / path.rpartition("/")[2]
        file.write_text(str(content))
        if content not in nars:
            nar = b"".join(dump(file))
            nars[content] = sha256(nar).hexdigest(), len(nar)
        references = [paths[other] for other in (2 * number + 1, 2 * number + 2) if other < NUMBER]
        registration += [path, *map(str, nars[content]), "", str(len(references)), *references]
    nix.run("nix-store", "--load-db", text="".join(f"{line}\n" for line in registration))
    return paths[0]


def requests(cache: Server) -> int:
    """All that it has answered so far, questions for its metrics apart."""
    text = cache.client().get("/metrics").text
    counted = re.findall(r"^cachesrv_http_requests_total\{([^}]*)\} ([0-9.]+)$", text, re.MULTILINE)
    return sum(int(float(count)) for labels, count in counted if 'route="metrics"' not in labels)


def test_ten_thousand_paths_are_a_handful_of_requests(builder: Nix, cache: Server) -> None:
    path = plant(builder)
    first = push(builder, cache, path)
    before = requests(cache)
    second = push(builder, cache, path)

    assert (first["uploaded"], second["present"], second["uploaded"]) == (NUMBER, NUMBER, 0)
    assert requests(cache) - before <= 5
    (published,) = cache.query("select count(*) from paths")
    assert published == (NUMBER,)
