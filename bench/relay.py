"""The least that a server has to do that passes NARs on from a bucket: receive, hash, write to a file, send from it.

    python -m bench.relay PORT FOLDER

It has a thread for each client, compares the hash with nothing, keeps nothing and syncs nothing. What it reaches, on a
machine that it shares with the bucket and the client, is as much as there is to be had.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import threading

_BUFFER = 2**20


def main() -> None:
    """Prints the port that it listens on."""
    port, folder = int(sys.argv[1]), sys.argv[2]
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    while True:
        client, _ = listening.accept()
        threading.Thread(target=_serve, args=(client, port, folder), daemon=True).start()


def _serve(client: socket.socket, port: int, folder: str) -> None:
    """The requests of one client, one after the other."""
    while request := _head(client):
        with socket.create_connection(("127.0.0.1", port)) as bucket:
            bucket.sendall(request)
            file = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
            try:
                _pass_on(bucket, client, file)
            finally:
                os.close(file)


def _head(client: socket.socket) -> bytes:
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        received = client.recv(65536)
        if not received:
            return b""
        request += received
    return request


def _pass_on(bucket: socket.socket, client: socket.socket, file: int) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    received = bucket.recv_into(buffer)
    answer = bytes(buffer[:received])
    body = answer.index(b"\r\n\r\n") + 4
    length = re.search(rb"\r\nContent-Length: (\d+)", answer, re.IGNORECASE)
    assert length
    size, written, sent, hasher = int(length[1]), 0, 0, hashlib.sha256()
    client.sendall(answer[:body])
    os.posix_fallocate(file, 0, size)
    piece = buffer[body:received] or buffer[: bucket.recv_into(buffer)]
    while piece:
        hasher.update(piece)
        written += os.write(file, piece)
        while sent < written:
            sent += os.sendfile(client.fileno(), file, sent, written - sent)
        piece = buffer[: bucket.recv_into(buffer)] if written < size else buffer[:0]


if __name__ == "__main__":
    main()
