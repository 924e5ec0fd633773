"""Several processes on one port, under load."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample
from tests.system.server import PATIENCE, Server, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.conftest import StartServer
    from tests.system.nix import Nix

WORKERS = 2
ABSENT = "0" * 32


@pytest.fixture
def server(make_server: StartServer, nix: Nix) -> Server:
    """Two workers, one published path."""
    return make_server(environment={"CACHESRV_SERVER__WORKERS": str(WORKERS)}).start()


@pytest.fixture
def narinfo(server: Server, nix: Nix) -> str:
    """The name of a published narinfo."""
    path = nix.add("shared", "served by all workers\n")
    nix.log_in(server.token)
    nix.run("nix", "copy", "--to", server.main, path)
    return f"/main/{hash_part(path)}.narinfo"


def hash_part(path: str) -> str:
    return path.rsplit("/", 1)[1][:32]


def worker_pids(server: Server) -> list[int]:
    """The children of the first process (proc(5))."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@dataclass
class Load:
    """Asks over kept connections and over new ones. A connection that breaks is what a client repeats its question
    for, as every HTTP client does; an answer that is not the right one is a failure.
    """

    server: Server
    narinfo: str
    answered: int = 0
    repeated: int = 0
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, *, keep: bool) -> None:
        connection = self._connect()
        while not self.stop.is_set():
            try:
                connection.request("GET", self.narinfo)
                response = connection.getresponse()
                body = response.read()
            except (ConnectionError, OSError) as error:
                if isinstance(error, TimeoutError):
                    self.failures.append(repr(error))
                self.repeated += 1
                connection.close()
                connection = self._connect()
                continue
            self.answered += 1
            if response.status != 200 or not body.startswith(b"StorePath: "):
                self.failures.append(f"{response.status} {body!r}")
            if not keep:
                connection.close()
                connection = self._connect()
        connection.close()

    def _connect(self) -> HTTPConnection:
        client = self.server.client()
        return HTTPConnection(client.host, client.port, timeout=PATIENCE)


@contextmanager
def load(server: Server, narinfo: str) -> Iterator[Load]:
    under = Load(server, narinfo)
    threads = [threading.Thread(target=under.run, kwargs={"keep": keep}) for keep in (True, True, False)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: under.answered > 100, "no load comes about")
        yield under
    finally:
        under.stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def more_answers(under: Load, number: int = 300) -> None:
    before = under.answered
    until(lambda: under.answered > before + number, "nothing is answered any more")


def test_a_reload_fails_no_request(server: Server, narinfo: str) -> None:
    with load(server, narinfo) as under:
        for number in range(1, 4):
            server.signal(signal.SIGHUP)
            more_answers(under)
            # One that comes before the one before it was heard of is one with it.
            read = number * WORKERS
            until(lambda: server.log.count("configuration reloaded") == read, "it is not read again")  # noqa: B023  called at once
    assert under.failures == []
    assert under.repeated == 0


def test_a_killed_worker_is_replaced_and_nobody_gets_a_wrong_answer(server: Server, narinfo: str) -> None:
    with load(server, narinfo) as under:
        victim, other = worker_pids(server)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(worker_pids(server)) - {victim}) == WORKERS, "the worker is not replaced")
        more_answers(under)
    assert under.failures == []
    # Only what was in flight on connections of the victim: no more than one request of each.
    assert under.repeated <= 3
    assert other in worker_pids(server)


def test_a_worker_is_replaced_whatever_became_of_the_configuration(make_server: StartServer) -> None:
    """Also when the files of keys are gone by then; what was right last is in force."""
    text = '[server]\nworkers = 2\n[[cache]]\nname = "main"\npriority = %s\nsigning_key_files = ["%s"]\n'
    first = make_server().start()
    server = make_server(config=text % (30, first.data_dir / "keys" / "main.secret")).start()

    def in_all(line: str) -> bool:
        """Connections are dealt out among the workers."""
        return all(line.encode() in server.client().get("/main/nix-cache-info").body for _ in range(16))

    def replace_all() -> None:
        old = worker_pids(server)
        for worker in old:
            os.kill(worker, signal.SIGKILL)
        until(lambda: len(set(worker_pids(server)) - {*old}) == WORKERS, "the workers are not replaced")

    server.config_file.write_text(text % (20, first.data_dir / "keys" / "main.secret"))
    server.signal(signal.SIGHUP)
    until(lambda: server.log.count("configuration reloaded") == WORKERS, "it is not read again")
    server.config_file.write_text(text % ("wrong", "nowhere"))
    (first.data_dir / "keys" / "main.secret").unlink()
    server.signal(signal.SIGHUP)
    until(lambda: "the configuration stays as it was" in server.log, "the mistake is not told")
    replace_all()
    assert in_all("Priority: 20\n")
    assert "a worker failed" not in server.log
    server.config_file.write_text('[server]\nworkers = 2\n[[cache]]\nname = "main"\npriority = 10\n')
    server.signal(signal.SIGHUP)
    until(lambda: server.log.count("configuration reloaded") == 2 * WORKERS, "it is not read again")
    assert in_all("Priority: 10\n")


def test_a_worker_that_is_starting_reads_the_configuration_again_too(make_server: StartServer) -> None:
    text = '[server]\nworkers = 2\n[[cache]]\nname = "main"\npriority = %s\n'
    server = make_server(config=text % 30).start()
    old = worker_pids(server)
    os.kill(old[0], signal.SIGKILL)
    until(lambda: bool({*worker_pids(server)} - {*old}), "the worker is not replaced")
    new = worker_pids(server)
    server.config_file.write_text(text % 20)
    server.signal(signal.SIGHUP)
    until(lambda: server.log.count("configuration reloaded") == WORKERS, "it is not read again")
    assert worker_pids(server) == new
    assert all(b"Priority: 20\n" in server.client().get("/main/nix-cache-info").body for _ in range(16))


def test_a_damaged_index_keeps_nobody_from_an_answer(server: Server) -> None:
    sample = Sample("sample")
    for url, body in ((sample.nar_url, sample.file), (sample.narinfo_url, sample.narinfo())):
        assert server.pusher.put(url, body).status == 204
    index = server.data_dir / "index"
    with (index / "data.mdb").open("r+b") as file:
        file.seek(8192)
        file.write(bytes((index / "data.mdb").stat().st_size - 8192))

    def answered() -> bool:
        """Whichever worker's socket the question comes to."""
        found = {server.client().get(sample.narinfo_url).status for _ in range(20)}
        return found == {200} and server.client().get(Sample("absent").narinfo_url).status == 404

    assert answered()
    assert (index / "damaged").exists()
    old = worker_pids(server)
    os.kill(old[0], signal.SIGKILL)
    until(lambda: len({*worker_pids(server)} - {old[0]}) == WORKERS, "the worker is not replaced")
    assert answered()
    assert "a worker failed" not in server.log
    server.stop()
    server.start()
    assert not (index / "damaged").exists()
    assert answered()


def test_metrics_are_those_of_all_workers(server: Server, narinfo: str) -> None:
    for _ in range(40):
        assert server.client().get(narinfo).status == 200
        assert server.client().get(f"/main/{ABSENT}.narinfo").status == 404
    before = counted(server, 'method="GET",route="narinfo",status="200"')
    assert before >= 40
    os.kill(worker_pids(server)[0], signal.SIGKILL)
    until(lambda: len(worker_pids(server)) == WORKERS, "the worker is not replaced")
    assert counted(server, 'method="GET",route="narinfo",status="200"') >= before


def counted(server: Server, labels: str) -> int:
    """A request counter, asked until a worker answers: the connection may be one to the worker that was killed."""
    for line in server.client().get("/metrics").text.splitlines():
        if line.startswith(f"cachesrv_http_requests_total{{{labels}}}"):
            return int(float(line.rsplit(" ", 1)[1]))
    return 0


def test_what_one_worker_takes_in_all_of_them_know(server: Server, nix: Nix) -> None:
    nix.log_in(server.token)
    for number in range(5):
        path = nix.add("file", f"file {number}\n")
        name = f"/main/{hash_part(path)}.narinfo"
        for _ in range(8):
            assert server.client().get(name).status == 404
        nix.run("nix", "copy", "--to", server.main, path)
        for _ in range(8):
            assert server.client().get(name).status == 200


def test_all_workers_end_with_the_first_process(server: Server) -> None:
    workers = worker_pids(server)
    assert len(workers) == WORKERS
    server.kill()
    until(lambda: not any(alive(pid) for pid in workers), "workers outlive the process that started them")


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_all_workers_stop_when_told_to(server: Server) -> None:
    workers = worker_pids(server)
    assert server.stop() == 0
    assert not any(alive(pid) for pid in workers)


def test_a_second_server_is_told_that_the_port_is_taken(server: Server, make_server: StartServer) -> None:
    second = make_server(environment={"CACHESRV_SERVER__WORKERS": "2"}, listen=server.listen)
    with pytest.raises(AssertionError, match=r"cannot listen on .*: Address already in use"):
        second.start()
