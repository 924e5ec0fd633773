"""The server as a process: how it starts, is told things, and ends; what it leaves on disk and in its log."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from base64 import b64encode
from http.client import HTTPResponse
from typing import TYPE_CHECKING

from tests.samples import Sample
from tests.system.client import Client, receive, whole
from tests.system.nix import CHAIN
from tests.system.push import push
from tests.system.server import CACHESRV, PATIENCE, inherited, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.conftest import MakeNix, StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server

SAMPLE = Sample("sample", b"in flight" * 300_000)
BEGUN = 1024 * 1024
"""Bytes of it that are sent before something happens."""


def publish(server: Server, sample: Sample, cache: str = "main") -> None:
    assert server.pusher.put(f"/{cache}/nar/{sample.nar_name}", sample.file).status == 204
    url = f"/{cache}/{sample.path.hash_part}.narinfo"
    assert server.pusher.put(url, sample.narinfo()).status == 204


def serve(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A server that is expected to end by itself."""
    command = [*CACHESRV, "serve", "--data-dir", str(server.data_dir), *arguments]
    return subprocess.run(
        command, check=False, env=server.environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_the_first_start_says_all_that_is_needed(make_server: StartServer, builder: Nix, make_nix: MakeNix) -> None:
    """Its words, copied as they are: two lines for nix.conf, and a command to push."""
    server = make_server(environment={"CACHESRV_SERVER__STORE_DIR": builder.store_dir}).start()
    settings = dict(re.findall(r"^    (extra-\S+) = (.+)$", server.greeting, re.MULTILINE))
    assert settings == {"extra-substituters": server.main, "extra-trusted-public-keys": server.public_key}
    commands = re.findall(r"^    cachesrv (push .+)$", server.greeting, re.MULTILINE)
    assert len(commands) == 2
    assert server.token not in server.greeting
    assert str(server.token_file) in server.greeting
    assert "another server with a key called main-1 as well, this one needs a key of another name" in " ".join(
        server.greeting.split()
    )
    (program,) = builder.build(CHAIN, "program")
    (builder.folder / "result").symlink_to(program)
    local, remote = (command.split() for command in commands)
    done = subprocess.run(
        [*CACHESRV, *local, "--data-dir", str(server.data_dir)],
        check=False,
        env=builder.environment,
        cwd=builder.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    remote[remote.index("FILE")] = str(server.token_file)
    remote = [word.replace("//HOST:", "//127.0.0.1:") for word in remote]
    done = subprocess.run(
        [*CACHESRV, *remote],
        check=False,
        env=builder.environment,
        cwd=builder.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    client = make_nix(store_dir=builder.store_dir)
    client.configure(max_jobs="0", **{name.replace("-", "_"): value for name, value in settings.items()})
    client.run("nix-store", "--realise", program)
    assert client.hashes(program) == builder.hashes(program)


def test_later_starts_are_short_and_change_nothing(server: Server) -> None:
    before = {file: file.read_bytes() for file in _secrets(server)}
    server.stop()
    server.start()
    assert server.greeting == f"cachesrv answers at {server.url} for main\n"
    assert {file: file.read_bytes() for file in _secrets(server)} == before


def test_a_cache_that_is_new_is_told_and_a_key_that_was_lost(server: Server) -> None:
    """Clients have to trust another key than before."""
    before = server.public_key
    server.stop()
    (server.data_dir / "keys/main.secret").unlink()
    (server.data_dir / "keys/main.public").unlink()
    server.start()
    assert server.public_key != before
    assert f"    extra-trusted-public-keys = {server.public_key}\n" in server.greeting
    server.stop()
    server.config_file.write_text('[[cache]]\nname = "main"\n[[cache]]\nname = "team"\n')
    server.start()
    assert "Clients of team have in nix.conf:" in server.greeting
    assert "Clients of main" not in server.greeting


def test_an_empty_push_token_is_refused(server: Server) -> None:
    server.stop()
    server.token_file.write_text("")
    done = serve(server)
    assert done.returncode == 2
    assert done.stderr == f"cachesrv: {server.token_file} is empty: remove it, and the next start makes a new token\n"


def test_storage_that_is_not_there_is_told(server: Server) -> None:
    """A disk that is not mounted, say: what is in the catalog is published, and cannot be had."""
    publish(server, Sample("one", b"one"))
    server.stop()
    objects = server.data_dir / "objects"
    objects.rename(server.data_dir / "elsewhere")
    server.start()
    assert "nothing lies in storage of what is published" in server.log
    server.stop()
    shutil.rmtree(objects)
    (server.data_dir / "elsewhere").rename(objects)
    server.start()
    assert server.log.count("nothing lies in storage of what is published") == 1


def test_secrets_are_for_their_owner(make_server: StartServer) -> None:
    """Also under a umask that would let everybody read."""
    server = make_server().start(umask=0)
    for file in _secrets(server):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(server.data_dir.stat().st_mode) & 0o007 == 0
    assert stat.S_IMODE((server.data_dir / "keys").stat().st_mode) & 0o077 == 0
    assert not [file for file in server.data_dir.rglob("*") if stat.S_IMODE(file.lstat().st_mode) & 0o002]


def test_secrets_are_not_in_the_log(server: Server) -> None:
    publish(server, SAMPLE)
    token, secret = server.token, (server.data_dir / "keys" / "main.secret").read_text().strip()
    wrong = "csrv_wrong-token-that-must-not-be-told"
    for header in (f"Bearer {wrong}", f"Basic {b64encode(f'user:{wrong}'.encode()).decode()}", f"Basic {wrong}"):
        server.client().ask("PUT", SAMPLE.narinfo_url, b"", {"Authorization": header})
    server.pusher.put(SAMPLE.narinfo_url, b"garbage")
    server.client().exchange(f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n broken\r\n\r\n".encode())
    server.stop()
    told = server.log + server.greeting
    for text in (token, wrong, secret.partition(":")[2], b64encode(f"user:{wrong}".encode()).decode()):
        assert text not in told


def test_sigterm_finishes_an_upload_in_flight(server: Server) -> None:
    with server.client().connect() as connection, server.client().connect() as idle:
        idle.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive(idle).status == 200
        connection.sendall(_begin_upload(server))
        server.signal(signal.SIGTERM)
        # it takes no more: neither on idle connections nor new ones
        assert idle.recv(1) == b""
        until(lambda: _refuses(server), "a server that stops takes connections")
        assert server.process.poll() is None
        connection.sendall(SAMPLE.file[BEGUN:])
        assert receive(connection, "PUT").status == 204
    assert server.process.wait(PATIENCE) == 0
    server.start()
    assert server.client().get(SAMPLE.nar_url).body == SAMPLE.file


def test_sigterm_finishes_a_download_in_flight(server: Server) -> None:
    large = Sample("large", bytes(range(256)) * 200_000)
    publish(server, large)
    with server.client().connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(f"GET {large.nar_url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        response = HTTPResponse(connection)
        response.begin()
        assert response.read(1000) == large.file[:1000]
        server.signal(signal.SIGTERM)
        until(lambda: _refuses(server), "a server that stops takes connections")
        assert whole(response).body == large.file[1000:]
    assert server.process.wait(PATIENCE) == 0


def test_sigterm_does_not_wait_for_ever(make_server: StartServer) -> None:
    server = make_server(environment={"CACHESRV_SERVER__SHUTDOWN_TIMEOUT": "1"}).start()
    before = server.snapshot()
    with server.client().connect() as connection:
        connection.sendall(_begin_upload(server))
        until(lambda: server.snapshot() != before, "the upload does not begin")
        assert server.stop() == 0
    assert server.snapshot() == before


def test_sighup_reads_the_configuration_again(make_server: StartServer) -> None:
    server = make_server(config='[[cache]]\nname = "main"\nroot = true\n').start()
    publish(server, SAMPLE)
    assert server.client().get("/main/nix-cache-info").body.count(b"Priority: 40\n") == 1
    text = '[[cache]]\nname = "main"\nroot = true\npriority = 20\n\n[[cache]]\nname = "added"\n'
    server.config_file.write_text(text)
    server.signal(signal.SIGHUP)
    until(lambda: server.client().get("/added/nix-cache-info").status == 200, "the new cache does not appear")
    assert b"Priority: 20\n" in server.client().get("/main/nix-cache-info").body
    publish(server, SAMPLE, "added")
    assert (server.data_dir / "keys" / "added.secret").exists()
    # a wrong one changes nothing, and is told to the operator
    server.config_file.write_text("[[cache]]\nname = 'main'\n\n[[cache]]\nname = 'no/good'\n")
    server.signal(signal.SIGHUP)
    until(lambda: "no/good" in server.log, "the mistake is not told")
    assert server.client().get("/added/nix-cache-info").status == 200
    assert b"Priority: 20\n" in server.client().get("/main/nix-cache-info").body
    # and a cache that is taken away goes
    server.config_file.write_text('[[cache]]\nname = "main"\nroot = true\n')
    server.signal(signal.SIGHUP)
    until(lambda: server.client().get("/added/nix-cache-info").status == 404, "the cache is still there")
    assert server.client().get(SAMPLE.narinfo_url).status == 200


def test_sighup_does_not_disturb_an_upload(make_server: StartServer) -> None:
    server = make_server(config='[[cache]]\nname = "main"\nroot = true\n').start()
    with server.client().connect() as connection:
        connection.sendall(_begin_upload(server))
        server.config_file.write_text('[[cache]]\nname = "main"\nroot = true\npriority = 20\n')
        server.signal(signal.SIGHUP)
        until(lambda: b"Priority: 20" in server.client().get("/main/nix-cache-info").body, "nothing is read again")
        connection.sendall(SAMPLE.file[BEGUN:])
        assert receive(connection, "PUT").status == 204


def test_a_wrong_configuration_is_refused_at_the_start(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text('[server]\nlisten = ["nowhere"]\nunheard_of = 1\n')
    done = serve(server, "--config", str(file))
    assert done.returncode == 2
    assert "server.listen" in done.stderr
    assert "server.unheard_of" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_taken(server: Server) -> None:
    done = serve(server, "--listen", server.listen)
    assert done.returncode == 2
    assert f"cannot listen on {server.listen}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_servers_share_a_data_directory(make_server: StartServer, server: Server) -> None:
    """What one publishes the other has at once, also where it had missed it; each finishes what it began."""
    other = make_server(data_dir=server.data_dir).start()
    assert other.client().get(SAMPLE.narinfo_url).status == 404
    publish(server, SAMPLE)
    assert other.client().get(SAMPLE.narinfo_url).status == 200
    assert other.client().get(SAMPLE.nar_url).body == SAMPLE.file
    samples = [Sample(f"sample-{number}", str(number).encode()) for number in range(20)]

    def publish_all(one: Server) -> None:
        for sample in samples:
            publish(one, sample)

    threads = [threading.Thread(target=publish_all, args=(one,)) for one in (server, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in (server, other):
        assert {one.client().get(sample.narinfo_url).status for sample in samples} == {200}
    other.kill()
    assert server.client().get(samples[0].narinfo_url).status == 200
    publish(server, Sample("afterwards", b"afterwards"))


def test_a_socket_in_the_file_system(make_server: StartServer) -> None:
    with tempfile.TemporaryDirectory(prefix="cachesrv-") as folder:  # names of sockets are short
        server = make_server(listen=f"unix:{folder}/socket").start()
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(f"{folder}/socket")
                connection.sendall(b"GET /main/nix-cache-info HTTP/1.1\r\nHost: x\r\n\r\n")
                assert receive(connection).body.startswith(b"StoreDir: ")
            # the file that is left behind is no obstacle
            server.kill()
            server.start()
        # but a server that answers there is
        assert serve(server, "--listen", f"unix:{folder}/socket").returncode == 2


LISTEN_FDS = """
import os, socket, sys
sock = socket.create_server(("127.0.0.1", 0))
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ["LISTEN_FDS"] = "1"
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "cachesrv", "serve", "--data-dir", *sys.argv[1:]])
"""


def test_socket_activation(tmp_path: Path) -> None:
    """The socket that it is given is used instead of its own: port 1 would be refused or answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN_FDS, str(tmp_path / "data"), "--listen", "127.0.0.1:1"],
        env=inherited() | {"HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        match = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert match
        assert match[1] != "1"
        assert Client(match[0]).get("/health/ready").status == 200
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_systemd_is_told(make_server: StartServer) -> None:
    import tempfile  # noqa: PLC0415

    with (
        tempfile.TemporaryDirectory(prefix="cachesrv-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        notified.bind(f"{folder}/notify")
        notified.settimeout(PATIENCE)
        environment = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "200000"}
        server = make_server(environment=environment).start()
        assert notified.recv(1000) == b"READY=1"
        assert [notified.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        server.signal(signal.SIGTERM)
        while (told := notified.recv(1000)) == b"WATCHDOG=1":
            pass
        assert told == b"STOPPING=1"


def test_tls(make_server: StartServer, make_nix: MakeNix, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject],
        check=True,
        capture_output=True,
    )
    environment = {
        "CACHESRV_SERVER__TLS_CERTIFICATE": str(certificate),
        "CACHESRV_SERVER__TLS_PRIVATE_KEY": str(key),
    }
    server = make_server(environment=environment).start()
    assert server.url.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=str(certificate))
    client = Client(server.url, server.token, trusting)
    assert client.put(SAMPLE.nar_url, SAMPLE.file).status == 204
    assert client.put(SAMPLE.narinfo_url, SAMPLE.narinfo()).status == 204
    assert client.get(SAMPLE.narinfo_url).status == 200
    assert client.get(SAMPLE.nar_url).body == SAMPLE.file
    assert client.get(SAMPLE.nar_url, Range="bytes=5-9").body == SAMPLE.file[5:10]
    source, other = make_nix(), make_nix()
    path = source.add("over-tls", "over TLS")
    for nix in (source, other):
        nix.environment |= {"SSL_CERT_FILE": str(certificate), "NIX_SSL_CERT_FILE": str(certificate)}
    assert push(source, server, path)["uploaded"] == 1
    other.run("nix", "copy", "--from", server.main, path)
    assert other.hashes(path) == source.hashes(path)


def test_health(server: Server) -> None:
    client = server.client()
    assert (client.get("/health/live").status, client.get("/health/ready").status) == (200, 200)
    assert client.get("/health/live").headers["cache-control"] == "no-store"


def test_metrics(server: Server) -> None:
    publish(server, SAMPLE)
    client = server.client()
    for _ in range(3):
        client.get(SAMPLE.narinfo_url)
    client.head(SAMPLE.narinfo_url)
    client.get(Sample("absent").narinfo_url)
    client.get(SAMPLE.nar_url)
    client.get("/nonsense/at/all")
    client.put(SAMPLE.narinfo_url, b"")
    server.pusher.put(SAMPLE.narinfo_url, Sample("sample", b"other").narinfo())
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = dict(re.findall(r"^(cachesrv_[^ ]+) (.+)$", answer.text, re.MULTILINE))

    def requests(method: str, route: str, status: int) -> float:
        return float(
            found.get(f'cachesrv_http_requests_total{{method="{method}",route="{route}",status="{status}"}}', 0)
        )

    assert requests("GET", "narinfo", 200) == 3
    assert requests("HEAD", "narinfo", 200) == 1
    assert requests("GET", "narinfo", 404) == 1
    assert requests("GET", "nar", 200) == 1
    assert requests("GET", "unmatched", 404) == 1
    assert requests("PUT", "narinfo", 204) == 1
    assert requests("PUT", "narinfo", 401) == 1
    assert requests("PUT", "narinfo", 409) == 1
    assert requests("PUT", "nar", 204) == 1
    assert float(found["cachesrv_sent_bytes_total"]) == len(SAMPLE.file)
    assert float(found["cachesrv_received_bytes_total"]) == len(SAMPLE.file)
    assert float(found["cachesrv_paths_published_total"]) == 1
    assert float(found["cachesrv_pushes_refused_total"]) == 1
    assert float(found["cachesrv_index_paths"]) == 1


def _secrets(server: Server) -> list[Path]:
    return [server.token_file, *(server.data_dir / "keys").glob("*.secret")]


def _begin_upload(server: Server) -> bytes:
    """The head of a request and the beginning of its body."""
    head = f"PUT {SAMPLE.nar_url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
    return f"{head}Content-Length: {len(SAMPLE.file)}\r\n\r\n".encode() + SAMPLE.file[:BEGUN]


def _refuses(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((server.client().host, server.client().port)) != 0
