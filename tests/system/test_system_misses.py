"""A path that was asked for before it was pushed is found right after the push: no absence outlives it."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from cachesrv.index.lmdb import LmdbIndex
from tests.system.conftest import both_storages, both_ways_and_storages
from tests.system.nix import CHAIN
from tests.system.push import both_ways, push
from tests.system.server import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.system.conftest import MakeClient
    from tests.system.nix import Nix
    from tests.system.push import Fill
    from tests.system.server import Server

# As Nix 2.8 sends it: plain enough to be answered from the index, without a parser.
PLAIN = "{} /main/{}.narinfo HTTP/1.1\r\nHost: {}\r\nUser-Agent: curl/7.88.1 Nix/2.8.0\r\nAccept: */*\r\n\r\n"
# The same for aiohttp: a field that the fast way does not know.
ODD = PLAIN.replace("Accept: */*", "Accept: */*\r\nX-Odd: 1")


def ask(server: Server, form: str, method: str, path: str) -> int:
    hash_part = path.rpartition("/")[2][:32]
    return server.client().exchange(form.format(method, hash_part, server.listen).encode()).status


@both_ways
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_was_missed_is_found_right_after_the_push(builder: Nix, cache: Server, fill: Fill, method: str) -> None:
    paths = [builder.add(f"file-{number}", str(number)) for number in range(4)]
    for path in paths:
        # The fast way looks into the catalog by itself, and has the index learn nothing; the other one does.
        assert [ask(cache, form, method, path) for form in (PLAIN, PLAIN, ODD)] == [404] * 3
    until(lambda: cache.absences == len(paths), "the index does not learn what is absent")
    for path in paths:
        fill(builder, cache, path)
        assert [ask(cache, form, method, path) for form in (PLAIN, ODD)] == [200] * 2
    assert cache.absences == 0


@both_ways
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_neither_absence_nor_publish_is_lost_with_the_server(
    builder: Nix, cache: Server, fill: Fill, end: signal.Signals
) -> None:
    """Absences survive a restart, and do not come back once a push has cleared them."""
    path = builder.add("file", "content")
    assert ask(cache, ODD, "GET", path) == 404
    until(lambda: cache.absences == 1, "the index does not learn what is absent")
    cache.signal(end)
    cache.process.wait(60)
    cache.start()
    assert cache.absences == 1
    assert ask(cache, PLAIN, "GET", path) == 404
    fill(builder, cache, path)
    assert ask(cache, PLAIN, "GET", path) == 200
    cache.signal(end)
    cache.process.wait(60)
    cache.start()
    assert ask(cache, PLAIN, "GET", path) == 200
    assert ask(cache, PLAIN, "HEAD", path) == 200
    assert cache.absences == 0


@both_storages
@both_ways
def test_a_client_that_missed_it_gets_it(
    builder: Nix, cache: Server, client: Nix, make_client: MakeClient, fill: Fill
) -> None:
    (program,) = builder.build(CHAIN, "program")
    assert client.attempt("nix", "copy", "--from", cache.main, program).returncode != 0
    assert builder.attempt("nix", "path-info", "--store", cache.main, program).returncode != 0
    builder.forget()
    fill(builder, cache, program)
    late = make_client(cache)
    late.run("nix", "copy", "--from", cache.main, program)
    client.forget()
    client.run("nix-store", "--realise", program)
    assert client.hashes(program) == late.hashes(program) == builder.hashes(program)


def test_hits_and_misses_come_from_the_index(builder: Nix, cache: Server) -> None:
    """What the index knows it answers though the catalog cannot."""
    there, absent, new = (builder.add(name, name) for name in ("there", "absent", "new"))
    push(builder, cache, there)
    assert (ask(cache, PLAIN, "GET", there), ask(cache, ODD, "GET", absent)) == (200, 404)
    until(lambda: cache.absences == 1, "the index does not learn what is absent")
    _break_catalog(cache)
    assert ask(cache, PLAIN, "GET", new) == 500
    assert (ask(cache, PLAIN, "GET", there), ask(cache, PLAIN, "GET", absent)) == (200, 404)
    assert (ask(cache, ODD, "HEAD", there), ask(cache, ODD, "HEAD", absent)) == (200, 404)


def test_an_error_is_not_remembered_as_an_absence(builder: Nix, cache: Server) -> None:
    there = builder.add("there", "there")
    push(builder, cache, there)
    cache.stop()
    shutil.rmtree(cache.data_dir / "index")
    cache.start()
    mend = _break_catalog(cache)
    assert ask(cache, PLAIN, "GET", there) == 500
    mend()
    assert ask(cache, PLAIN, "GET", there) == 200
    assert cache.absences == 0


@both_ways_and_storages
def test_an_absence_that_outlived_a_crash_is_cleared_by_the_next_push(builder: Nix, cache: Server, fill: Fill) -> None:
    """Killed between catalog and index: what was published is hidden, until it is pushed again."""
    path = builder.add("file", "content")
    fill(builder, cache, path)
    cache.kill()
    key = ("main", path.rpartition("/")[2][:32])
    index = LmdbIndex(str(cache.data_dir / "index"))
    index.delete([key])
    index.put_absent([key], int(time.time()) + 3600)
    index.close()
    cache.start()
    assert ask(cache, PLAIN, "GET", path) == 404
    builder.forget()
    fill(builder, cache, path)
    assert ask(cache, PLAIN, "GET", path) == 200


def _break_catalog(server: Server) -> Callable[[], None]:
    """Take a table away under the server's feet; what gives it back."""

    def rename(old: str, new: str) -> None:
        with closing(sqlite3.connect(server.data_dir / "catalog.sqlite")) as catalog:
            catalog.execute(f"alter table {old} rename to {new}")

    rename("paths", "away")
    return lambda: rename("away", "paths")
