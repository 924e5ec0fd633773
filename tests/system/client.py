"""HTTP as tests speak it: whole answers, and bytes as they are."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping

PATIENCE = 60.0
"""Seconds after which an answer is taken not to come."""


@dataclass(frozen=True)
class Answer:
    """A whole answer; names of header fields are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Client:
    """Asks a server, each time on a new connection; paths begin with a slash."""

    def __init__(self, url: str, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.url = url
        self.token = token
        self._tls = tls
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self.host, self.port = parts.hostname, parts.port

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """A request as given; the token goes with it unless the headers say otherwise."""
        fields = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connection = self.open()
        try:
            connection.request(method, path, body, {**fields, **(headers or {})})
            return whole(connection.getresponse())
        finally:
            connection.close()

    def open(self) -> HTTPConnection:
        """A connection for several requests, one after the other."""
        if self._tls:
            return HTTPSConnection(self.host, self.port, timeout=PATIENCE, context=self._tls)
        return HTTPConnection(self.host, self.port, timeout=PATIENCE)

    def get(self, path: str, **headers: str) -> Answer:
        """Header names are written with underscores. A redirect is followed, without the token."""
        answer = self.ask("GET", path, headers=_fields(headers))
        if answer.status != 307:
            return answer
        target = urlsplit(answer.headers["location"])
        return Client(f"{target.scheme}://{target.netloc}").get(f"{target.path}?{target.query}", **headers)

    def head(self, path: str, **headers: str) -> Answer:
        return self.ask("HEAD", path, headers=_fields(headers))

    def put(self, path: str, body: bytes | Iterable[bytes], **headers: str) -> Answer:
        return self.ask("PUT", path, body, _fields(headers))

    def connect(self) -> socket.socket:
        """A connection for bytes as they are."""
        return socket.create_connection((self.host, self.port), PATIENCE)

    def exchange(self, data: bytes) -> Answer:
        """Send bytes as they are; the first answer that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            return receive(connection, data.split(b" ", 1)[0].decode())


def receive(connection: socket.socket, method: str = "GET") -> Answer:
    """The next answer on a connection."""
    response = HTTPResponse(connection, method=method)
    try:
        response.begin()
        return whole(response)
    finally:
        response.close()


def whole(response: HTTPResponse) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def _fields(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
