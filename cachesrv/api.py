"""The push API, version 1: the wire structs, written once, used by the server and the uploader.

All of it lives under `/api/v1/caches/<cache>/`, JSON both ways, authorised like every other request. A request body may
be compressed (`Content-Encoding: zstd` or `gzip`). Errors are `ErrorAnswer` with the HTTP status that fits.

    GET  /api/v1/caches/<cache>           -> CacheAnswer      what a client has to know of the cache (pull)
    POST /api/v1/caches/<cache>/missing   MissingRequest -> MissingAnswer    which of these are not there (push)
    POST /api/v1/caches/<cache>/paths     PublishRequest -> PublishAnswer    publish paths whose NARs are there (push)

A NAR is sent before its path is published, by `PUT /<cache>/nar/<NAR hash>.nar.zst` (`application/x-nix-nar`): named
by its NAR hash, so that an equal NAR is sent once. The server checks it while it streams, and answers a NAR that it
already has without reading it when the client asks first by `Expect: 100-continue` or HEAD.

Fields may be added: readers pass over those that they do not know. `MAX_BATCH` bounds the paths of one request.
"""

from __future__ import annotations

import msgspec

MAX_BATCH = 5000
"""Paths in one request, at most."""

MAX_REQUEST_SIZE = 64 * 1024 * 1024
"""Bytes of one request body after decoding, at most."""


def cache_url(base: str, cache: str, action: str = "") -> str:
    """The URL of an action of the push API; `base` is the server's, without a trailing slash."""
    return f"{base}/api/v1/caches/{cache}" + (f"/{action}" if action else "")


class ErrorAnswer(msgspec.Struct, frozen=True):
    """What went wrong, in one line that says what to do."""

    error: str


class CacheAnswer(msgspec.Struct, frozen=True):
    """`public_keys` in Nix's `name:base64` form; `upstreams` are the caches that clients of this one are expected to
    have beside it, none where references have to resolve in the cache itself; `max_nar_size` in bytes of the
    compressed file, 0 for no limit.
    """

    name: str
    store_dir: str
    priority: int
    public: bool
    public_keys: list[str]
    upstreams: list[UpstreamAnswer]
    max_nar_size: int


class UpstreamAnswer(msgspec.Struct, frozen=True):
    """A cache whose paths need not be pushed."""

    url: str
    public_keys: list[str]


class WantedPath(msgspec.Struct, frozen=True, array_like=True):
    """A store path (base name) that a client could send, with the `sha256:<nix32>` and size in bytes of its NAR."""

    path: str
    nar_hash: str
    nar_size: int


class MissingRequest(msgspec.Struct, frozen=True):
    """Which of these does the cache not have?"""

    paths: list[WantedPath]


class PublishedOtherwise(msgspec.Struct, frozen=True):
    """A path that is published with another NAR than the client has."""

    path: str
    published_nar_hash: str


class MissingAnswer(msgspec.Struct, frozen=True):
    """Base names. `missing`: not published; `stored`: those of them whose NAR is here already and needs no sending;
    `conflicts`: published, with another NAR hash.
    """

    missing: list[str]
    stored: list[str]
    conflicts: list[PublishedOtherwise]


class PathToPublish(msgspec.Struct, frozen=True):
    """A path whose NAR is here. Base names; `nar_hash` as `sha256:<nix32>`; `signatures` and `ca` in Nix's forms."""

    path: str
    nar_hash: str
    nar_size: int
    references: list[str]
    deriver: str | None = None
    signatures: list[str] = []
    ca: str | None = None


class PublishRequest(msgspec.Struct, frozen=True):
    """Paths to publish, each after those that it refers to."""

    paths: list[PathToPublish]


class PathOutcome(msgspec.Struct, frozen=True):
    """`error` is None when the path is published now, by this request or before it. `kind` tells programs why not:
    `conflict`, `missing-nar`, `missing-references`, `unsigned`, `bad-input` or `failed`.
    """

    path: str
    error: str | None = None
    kind: str | None = None


class PublishAnswer(msgspec.Struct, frozen=True):
    """One outcome a path, in the order of the request."""

    outcomes: list[PathOutcome]
