"""Real stores through the real daemon and from the real database: both tell what Nix itself tells."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachesrv.errors import BadInput, DaemonError, NotFound, StoreError, StoreUnavailable
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.realisation import OutputId, parse_realisation
from cachesrv.nix.store_path import StorePath
from cachesrv.push.local_store import LocalStore, open_store
from tests.system.nix import CHAIN, Nix
from tests.system.server import CACHESRV, Server


class Machine:
    """A machine that builds, with the daemon at `socket` while `daemon()` lasts."""

    def __init__(self, folder: Path) -> None:
        self.nix = Nix(folder / "nix", builds=True)
        self.nix.configure(store="local")
        self.nix.run("nix-store", "--init")  # without its folders, the daemon would take itself for its store
        self.socket = folder / "socket"
        self.environment = self.nix.environment | {"NIX_DAEMON_SOCKET_PATH": str(self.socket)}

    @contextmanager
    def daemon(self) -> Iterator[int]:
        """The process that accepts connections; each connection has one of its own."""
        with subprocess.Popen(["nix-daemon"], env=self.environment, stderr=subprocess.DEVNULL) as process:
            try:
                self._wait()
                yield process.pid
            finally:
                process.terminate()
        self.socket.unlink(missing_ok=True)

    def _wait(self) -> None:
        for _ in range(500):
            with socket.socket(socket.AF_UNIX) as sock:
                if sock.connect_ex(str(self.socket)) == 0:
                    return
            time.sleep(0.01)
        pytest.fail("the daemon does not come up")

    def path(self, full: str) -> StorePath:
        return StorePath.parse_full(full, self.nix.store_dir)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    # Not under tmp_path: the names of sockets are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="nix-"))
    yield Machine(folder)
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def program(machine: Machine) -> str:
    """A signed path with references to itself and others."""
    [path] = machine.nix.build(CHAIN, "program")
    secret, public = machine.nix.folder / "secret", machine.nix.folder / "public"
    machine.nix.run("nix-store", "--generate-binary-cache-key", "test-1", str(secret), str(public))
    machine.nix.run("nix", "store", "sign", "-r", "-k", str(secret), path)
    return path


@pytest.fixture(scope="module")
def daemon(machine: Machine) -> Iterator[int]:
    with machine.daemon() as pid:
        yield pid


@pytest.fixture(params=["daemon", "local"])
async def store(request: pytest.FixtureRequest, machine: Machine, daemon: int) -> AsyncIterator[LocalStore]:
    opened = await open_store(request.param, machine.environment)
    assert opened.name.startswith("Nix daemon" if request.param == "daemon" else "Nix store with database")
    yield opened
    await opened.close()


def told_by_nix(machine: Machine, *words: str) -> dict[StorePath, PathInfo]:
    return {
        machine.path(full): PathInfo(
            store_path=machine.path(full),
            nar_hash=Hash.parse(info["narHash"]),
            nar_size=info["narSize"],
            references=tuple(sorted(map(machine.path, info["references"]))),
            deriver=machine.path(info["deriver"]) if "deriver" in info else None,
            signatures=tuple(sorted(info.get("signatures", ()))),
            ca=info.get("ca"),
            registration_time=info["registrationTime"],
            ultimate=info.get("ultimate", False),
        )
        for full, info in machine.nix.infos(*words).items()
    }


def dumped_by_nix(path: str) -> bytes:
    return subprocess.run(["nix-store", "--dump", path], check=True, stdout=subprocess.PIPE).stdout


def kill_children(pid: int) -> None:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)


def spoil(path: str) -> None:
    """Puts something into a path that no NAR can hold."""
    Path(path).chmod(0o755)
    os.mkfifo(f"{path}/b")


async def read(store: LocalStore, info: PathInfo) -> bytes:
    return b"".join([chunk async for chunk in store.nar(info)])


async def test_closures_are_what_nix_says(machine: Machine, program: str, store: LocalStore) -> None:
    expected = told_by_nix(machine, program)
    closure = await store.closure([machine.path(program)])
    assert {info.store_path: info for info in closure} == expected
    assert [info.store_path.name for info in closure] == ["library", "tool", "program"]
    assert closure[1].store_path in closure[1].references
    assert closure[1].signatures
    assert await store.path_info(closure[0].store_path) == closure[0]


async def test_derivations_and_sources_are_paths_like_others(machine: Machine, program: str, store: LocalStore) -> None:
    drv = machine.nix.run("nix-store", "-qd", program)
    expected = told_by_nix(machine, "--derivation", drv)
    assert {info.store_path: info for info in await store.closure([machine.path(drv)])} == expected
    assert any(info.ca for info in expected.values())


async def test_what_was_added_meanwhile_is_seen(machine: Machine, store: LocalStore) -> None:
    added = machine.path(machine.nix.add("news", f"for {store.name}"))
    assert (await store.path_info(added)).ca


async def test_a_path_that_is_not_valid(machine: Machine, store: LocalStore) -> None:
    absent = StorePath("0" * 32, "absent")
    with pytest.raises(NotFound, match=absent.full(machine.nix.store_dir)):
        await store.closure([absent])


async def test_names_of_files_lead_to_store_paths(machine: Machine, program: str, store: LocalStore) -> None:
    tool = (await store.closure([machine.path(program)]))[1].store_path
    full = tool.full(store.store_dir)
    folder = machine.nix.folder
    (folder / "result").unlink(missing_ok=True)
    machine.nix.run("nix-store", "--realise", full, "--add-root", "result")
    for name in (full, f"{full}/bin/tool", f"{folder}/result", f"{folder}/result/bin", f"{folder}/etc/../result"):
        assert await store.resolve(name) == tool
    with pytest.raises(NotFound, match="leads nowhere"):
        await store.resolve(f"{folder}/no-result")
    with pytest.raises(BadInput, match="is not in the store"):
        await store.resolve(f"{folder}/etc/nix.conf")


async def test_files_are_read_where_they_lie(machine: Machine, program: str, store: LocalStore) -> None:
    assert store.real_path(machine.path(program)) == program
    assert store.real_path(StorePath("0" * 32, "absent")) is None


async def test_realisations_are_what_nix_copies_into_a_cache(machine: Machine, store: LocalStore) -> None:
    expression = """
        let
          ca = name: needs: derivation {
            inherit name needs;
            system = builtins.currentSystem;
            builder = "/bin/sh";
            args = [ "-c" "echo $needs > $out" ];
            __contentAddressed = true;
            outputHashMode = "recursive";
            outputHashAlgo = "sha256";
          };
        in ca "above" (ca "below" "")
    """
    [above] = machine.nix.build(expression)
    cache = machine.nix.folder / "cache"
    machine.nix.run("nix", "copy", "--to", f"file://{cache}", "--file", "default.nix")
    copied = {
        id_: parse_realisation(file.read_bytes(), id_)
        for file in (cache / "realisations").iterdir()
        for id_ in [OutputId.parse(file.stem)]
    }
    assert len(copied) == 2
    paths = [info.store_path for info in await store.closure([machine.path(above)])]
    known = await store.realisations(paths)
    # Nix copies those of the derivation that was named; its resolved form, which was built, has another one.
    assert {id_: known[id_] for id_ in copied} == copied
    assert {realisation.out_path for realisation in known.values()} == set(paths)
    assert len(known) == 3


# The daemon alone


async def test_nars_from_the_daemon_are_what_nix_dumps(machine: Machine, program: str, daemon: int) -> None:
    store = await open_store("daemon", machine.environment)
    for info in await store.closure([machine.path(program)]):
        nar = await read(store, info)
        assert nar == dumped_by_nix(info.store_path.full(store.store_dir))
        assert hashlib.sha256(nar).digest() == info.nar_hash.digest
    await store.close()


async def test_what_the_daemon_cannot_dump_is_told_in_its_words(machine: Machine, daemon: int) -> None:
    """It notices in the middle of the NAR, and puts its error there."""
    folder = machine.nix.folder / "broken"
    folder.mkdir()
    (folder / "a").write_bytes(os.urandom(1 << 20))
    full = machine.nix.run("nix-store", "--add", str(folder))
    spoil(full)
    store = await open_store("daemon", machine.environment)
    info = await store.path_info(machine.path(full))
    expected = rf"^the Nix daemon at {machine.socket}: file '{full}/b' has an unsupported type"
    with pytest.raises(DaemonError, match=expected):
        await read(store, info)
    assert await store.path_info(info.store_path) == info
    await store.close()


async def test_a_daemon_that_is_killed_in_the_middle_of_a_nar(machine: Machine, daemon: int) -> None:
    large = machine.nix.add("large", bytes(20 << 20))
    store = await open_store("daemon", machine.environment)
    info = await store.path_info(machine.path(large))
    async with asyncio.timeout(20), aclosing(store.nar(info)) as chunks:
        await anext(chunks)
        kill_children(daemon)
        with pytest.raises(DaemonError, match=f"it hung up after [0-9]+ of {info.nar_size} bytes"):
            async for _ in chunks:
                pass
    assert await store.path_info(info.store_path) == info  # the next connection has a process of its own
    await store.close()


async def test_the_database_if_it_can_be_read_else_the_daemon(machine: Machine, program: str, daemon: int) -> None:
    by_database = await open_store(None, machine.environment)
    assert by_database.name == f"Nix store with database {machine.nix.folder}/var/db/db.sqlite"
    without = machine.environment | {"NIX_STATE_DIR": str(machine.nix.folder / "none")}
    by_daemon = await open_store(None, without)
    assert by_daemon.name == f"Nix daemon 2.8.0 at {machine.socket}"
    paths = [machine.path(program)]
    assert await by_daemon.closure(paths) == await by_database.closure(paths)
    await by_daemon.close()
    await by_database.close()
    with pytest.raises(DaemonError, match="cannot be reached"):
        await open_store("daemon", machine.environment | {"NIX_DAEMON_SOCKET_PATH": f"{machine.socket}-none"})


async def test_what_the_database_store_may_not_read_comes_from_the_daemon(
    machine: Machine, program: str, daemon: int
) -> None:
    store = await open_store(None, machine.environment)
    info = await store.path_info(machine.path(program))
    assert await read(store, info) == dumped_by_nix(program)
    await store.close()
    for name, environment in (
        (None, machine.environment | {"NIX_DAEMON_SOCKET_PATH": f"{machine.socket}-none"}),
        ("local", machine.environment),
    ):
        store = await open_store(name, environment)
        with pytest.raises(StoreUnavailable, match=f"{program} cannot be read, and "):
            await read(store, info)
        await store.close()


async def test_neither_daemon_nor_database(tmp_path: Path) -> None:
    environment = {"NIX_STATE_DIR": str(tmp_path)}
    with pytest.raises(StoreUnavailable) as caught:
        await open_store(None, environment)
    assert str(caught.value) == (
        "no Nix store can be read: "
        f"the Nix daemon at {tmp_path}/daemon-socket/socket cannot be reached: No such file or directory; "
        f"there is no Nix store with a database at {tmp_path}/db/db.sqlite"
    )


# Chroot stores


async def test_a_chroot_store(tmp_path: Path) -> None:
    nix = Nix(tmp_path / "nix")
    full = nix.add("file", "content")
    assert full.startswith("/nix/store/")
    store = await open_store(nix.store, {})
    path = StorePath.parse_full(full, "/nix/store")
    info: dict[str, Any] = nix.infos(full)[full]
    [known] = await store.closure([path])
    assert (known.nar_size, known.nar_hash, known.ca) == (info["narSize"], Hash.parse(info["narHash"]), info["ca"])
    physical = f"{nix.root}/{path}"
    assert store.real_path(path) == physical
    assert physical.startswith(str(tmp_path))
    (tmp_path / "result").symlink_to(full)
    for name in (full, physical, f"{tmp_path}/result"):
        assert await store.resolve(name) == path
    (nix.root / str(path)).unlink()
    with pytest.raises(StoreError, match=f"{physical} is missing: damaged, or just collected"):
        await read(store, known)
    await store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to be somebody else")
def test_what_only_the_daemon_may_read_is_pushed_in_few_requests(machine: Machine, daemon: int, tmp_path: Path) -> None:
    paths = machine.nix.evaluate(
        'map (n: builtins.toFile "path-${toString n}" (toString n)) (builtins.genList (n: n) 100)'
    )
    server = Server(tmp_path / "server", environment={"CACHESRV_SERVER__STORE_DIR": machine.nix.store_dir}).start()
    store = Path(machine.nix.store_dir)
    mode = store.stat().st_mode
    machine.socket.parent.chmod(0o755)
    machine.socket.chmod(0o777)
    try:
        store.chmod(0o700)
        done = subprocess.run(
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
                *(*CACHESRV, "push", "--to", server.main, "--store", "daemon", "--json", "--stdin"),
            ],
            check=False,
            env=machine.environment | {"HOME": "/nonexistent", "CACHESRV_TOKEN": server.token_file.read_text().strip()},
            input="\n".join(paths),
            capture_output=True,
            text=True,
            timeout=100,
        )
        requests = server.client().get("/metrics").text
    finally:
        store.chmod(mode)
        server.dispose()

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["uploaded"] == 100
    assert 'cachesrv_http_requests_total{method="POST",route="api",status="200"} 2.0' in requests
    assert 'route="nar"' not in requests
