"""Ceph's gateway as the S3 server of the tests: one monitor, one OSD that keeps objects in memory, one gateway, all on
loopback and in one folder.

All processes of a test run share one cluster. The first to need it starts a keeper (`python -m tests.radosgw FOLDER`),
whose children the daemons are; each user holds a shared lock on a file. When the keeper gets that file for itself,
nobody is left, however they ended: it kills the daemons and goes.

Needs radosgw, ceph-mon and ceph-osd. On one's own backend (dbstore) the gateway does ranges, multipart uploads and
conditional writes wrong: so a small cluster it is.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import botocore.session
from botocore.config import Config
from botocore.loaders import Loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from types_boto3_s3 import S3Client as Sdk

ACCESS_KEY = "testkey"
SECRET_KEY = "testsecret"
STRANGER = "stranger"
"""User, access key and secret key of somebody who may do only what a bucket's policy says."""
VIRTUAL_DOMAIN = "localhost"
"""The gateway's name; host names below it name a bucket."""

_PATIENCE = 60.0
_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_SETTINGS = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
ms_bind_ipv6 = false
ms_mon_client_mode = crc
ms_client_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
paxos_propose_interval = 0.02
paxos_min_wait = 0.005
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_op_num_shards = 2
osd_objectstore = memstore
memstore_device_bytes = 2147483648
log_to_stderr = false
log_file = {folder}/$name.log
run_dir = {folder}
admin_socket =
mon_data = {folder}/mon
osd_data = {folder}/osd
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_data = {folder}/rgw
rgw_dns_name = {domain}
rgw_thread_pool_size = 64
"""


class GatewayError(Exception):
    """The gateway does not come up."""


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    endpoint: str
    port: int
    _loader: Loader = field(default_factory=Loader, repr=False, compare=False)
    """Keeps what the SDK knows of S3, which takes long to read anew for each session."""

    def session(self, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> botocore.session.Session:
        """Credentials as the stores take them."""
        session = botocore.session.Session()
        session.register_component("data_loader", self._loader)
        session.set_credentials(access_key, secret_key)
        return session

    def environment(self) -> dict[str, str]:
        """Credentials as processes take them."""
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_EC2_METADATA_DISABLED": "1"}

    def client(self) -> Sdk:
        """A client of the SDK, to look behind the back of what is tested."""
        client = self.session().create_client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", config=Config(signature_version="s3v4")
        )
        return cast("Sdk", client)

    def make_bucket(self) -> str:
        """A new bucket; its name."""
        name = f"test-{uuid.uuid4().hex}"
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name


@contextmanager
def shared_gateway(folder: Path) -> Iterator[Gateway]:
    """The gateway of all processes that name this folder."""
    folder.mkdir(exist_ok=True)
    with (folder / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        with (folder / "starting").open("w") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            port = _running(folder) or _start(folder)
        yield Gateway(f"http://127.0.0.1:{port}", port)


def _running(folder: Path) -> int | None:
    with suppress(FileNotFoundError):
        said = json.loads((folder / "gateway.json").read_text())
        if _answers(said["port"]):
            return int(said["port"])
    return None


def _start(folder: Path) -> int:
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise GatewayError(f"{', '.join(missing)}: not installed; tests/run does it")
    for _ in range(2):
        # A port may be taken by somebody else between its choice and its use.
        with suppress(GatewayError):
            return _start_keeper(folder)
    return _start_keeper(folder)


def _start_keeper(folder: Path) -> int:
    with (folder / "keeper.log").open("ab") as log:
        keeper = subprocess.Popen(
            (sys.executable, "-m", "tests.radosgw", str(folder)),
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _PATIENCE
    while (port := _running(folder)) is None:
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise GatewayError((folder / "keeper.log").read_text())
        time.sleep(0.02)
    # It outlives this process when others need it longer, and is then nobody's child.
    keeper.returncode = 0
    return port


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class _Cluster:
    """What the keeper keeps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        """Returns the port of the gateway when it answers."""
        port, v2, v1 = _free_ports(3)
        folder = self._folder
        fsid = str(uuid.uuid4())
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        (folder / "ceph.conf").write_text(
            _SETTINGS.format(folder=folder, fsid=fsid, port=port, v1=v1, v2=v2, domain=VIRTUAL_DOMAIN)
        )
        monmap = str(folder / "monmap")
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]", monmap)
        self._ceph("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._daemon("ceph-mon", "-i", "a", "-f")
        osd = str(uuid.uuid4())
        self._ceph("ceph", "--connect-timeout", "30", "osd", "create", osd)
        self._ceph("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0", "-f")
        run("ceph-authtool", "--create-keyring", str(folder / "rgw/keyring"), "--gen-key", "-n", "client.rgw")
        for user, access, secret in (("owner", ACCESS_KEY, SECRET_KEY), (STRANGER, STRANGER, STRANGER)):
            keys = ("--access-key", access, "--secret", secret)
            self._ceph(
                "radosgw-admin", "-n", "client.rgw", "user", "create", "--uid", user, "--display-name", user, *keys
            )
        gateway = self._daemon("radosgw", "-n", "client.rgw", "-f")
        while not _answers(port):
            if gateway.poll() is not None:
                raise GatewayError(f"radosgw ended with {gateway.returncode}")
            time.sleep(0.02)
        return port

    def kill(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()

    def _ceph(self, program: str, *arguments: str) -> None:
        run(program, "-c", str(self._folder / "ceph.conf"), *arguments)

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = (program, "-c", str(self._folder / "ceph.conf"), *arguments)
        # The keeper has one thread only.
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)  # noqa: PLW1509
        self._daemons.append(daemon)
        return daemon


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode != 0:
        raise GatewayError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


def _free_ports(number: int) -> list[int]:
    with closing_all([socket.socket() for _ in range(number)]) as sockets:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def closing_all(sockets: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()


def keep(folder: Path) -> None:
    """Keep a cluster while anybody uses it."""
    with tempfile.TemporaryDirectory(prefix="radosgw-", ignore_cleanup_errors=True) as state:
        cluster = _Cluster(Path(state))
        try:
            _announce(folder, cluster.start())
            _wait_until_unused(folder)
        finally:
            cluster.kill()


def _announce(folder: Path, port: int) -> None:
    new = folder / "gateway.json.new"
    new.write_text(json.dumps({"port": port, "keeper": os.getpid()}))
    new.rename(folder / "gateway.json")


def _wait_until_unused(folder: Path) -> None:
    with (folder / "users").open("w") as users:
        while True:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.5)
            else:
                (folder / "gateway.json").unlink()
                return


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
