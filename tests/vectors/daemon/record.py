"""Records `session.json` anew: what the installed nix-daemon says to `cachesrv.nix.worker_protocol`.

Run it from the root of the repository, as any user, with Nix on PATH: python -m tests.vectors.daemon.record
"""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from cachesrv.nix import worker_protocol
from cachesrv.nix.daemon_messages import OperationFailed
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.worker_protocol import Steps

FOLDER = Path("/tmp/cachesrv-vectors")
STORE_DIR = str(FOLDER / "store")
EXPRESSION = """
  let
    library = builtins.toFile "library" "quiet";
  in derivation {
    name = "program"; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo $out ${library} > $out" ];
  }
"""
CONFIGURATION = """
experimental-features = nix-command
build-users-group =
sandbox = false
substituters =
"""
SECRET_KEY = Path(__file__).parent.parent / "keys" / "cache.test-1.secret"


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / "nix.conf").write_text(CONFIGURATION)
    (FOLDER / "default.nix").write_text(EXPRESSION)
    run("nix-store", "--init")
    program = run("nix-build", "--no-out-link", str(FOLDER / "default.nix"))
    run("nix", "store", "sign", "-k", str(SECRET_KEY), program)
    with subprocess.Popen(["nix-daemon"], env=environment(NIX_REMOTE="local"), stderr=subprocess.DEVNULL) as daemon:
        try:
            session = record(StorePath.parse_full(program, STORE_DIR))
        finally:
            daemon.terminate()
    session["nix"] = run("nix", "--version")
    session["path-info"] = json.loads(run("nix", "path-info", "--json", program))[0]
    (Path(__file__).parent / "session.json").write_text(json.dumps(session, indent=2, sort_keys=True) + "\n")


def record(program: StorePath) -> dict[str, Any]:
    absent = StorePath("0" * 32, "absent")
    with socket.socket(socket.AF_UNIX) as sock:
        while sock.connect_ex(str(FOLDER / "socket")):
            time.sleep(0.1)
        return {
            "handshake": exchange(sock, worker_protocol.handshake()),
            "valid": ask(sock, worker_protocol.query_path_info(program, STORE_DIR)),
            "invalid": ask(sock, worker_protocol.query_path_info(absent, STORE_DIR)),
            "nar": ask(sock, worker_protocol.nar_from_path(program, STORE_DIR)) | {"then": sock.recv(4096).hex()},
            # There is no NAR to send: an error follows where it would begin, and the daemon hangs up.
            "no-nar": ask(sock, worker_protocol.nar_from_path(absent, STORE_DIR)) | {"then": until_end(sock)},
        }


def ask(sock: socket.socket, operation: worker_protocol.Operation[Any]) -> dict[str, str]:
    return exchange(sock, worker_protocol.perform(operation))


def exchange(sock: socket.socket, steps: Steps[Any]) -> dict[str, str]:
    """All bytes that one exchange sent and received."""
    sent = received = b""
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, bytes):
                sock.sendall(wanted)
                sent += wanted
                wanted = next(steps)
            else:
                data = sock.recv(wanted, socket.MSG_WAITALL)
                received += data
                wanted = steps.send(data)
    except (StopIteration, OperationFailed):
        return {"sent": sent.hex(), "received": received.hex()}


def until_end(sock: socket.socket) -> str:
    data = b""
    while chunk := sock.recv(4096):
        data += chunk
    return data.hex()


def run(*command: str) -> str:
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def environment(**more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(FOLDER),
        "NIX_CONF_DIR": str(FOLDER),
        "NIX_STORE_DIR": STORE_DIR,
        "NIX_STATE_DIR": str(FOLDER / "var"),
        "NIX_LOG_DIR": str(FOLDER / "log"),
        "NIX_DAEMON_SOCKET_PATH": str(FOLDER / "socket"),
        **more,
    }


if __name__ == "__main__":
    main()
