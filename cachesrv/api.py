"""The push API, version 1: the wire structs, written once, used by the server and the uploader.

All of it lives under `/api/v1/caches/<cache>/`, JSON both ways, authorised like every other request. A request body may
be compressed (`Content-Encoding: zstd` or `gzip`). Errors are `ErrorAnswer` with the HTTP status that fits.

    GET  /api/v1/caches/<cache>           -> CacheAnswer      what a client has to know of the cache (pull)
    POST /api/v1/caches/<cache>/missing   MissingRequest -> MissingAnswer    which of these are not there (push)
    POST /api/v1/caches/<cache>/paths     PublishRequest -> PublishAnswer    publish paths whose NARs are there (push)
    POST /api/v1/caches/<cache>/nars      a pack -> PackAnswer               small NARs, and paths to publish (push)

    POST   …/<cache>/uploads                           BegunRequest -> BegunAnswer        which are begun (push)
    PUT    …/<cache>/uploads/<upload>                  UploadRequest -> UploadAnswer      begin, or take up again (push)
    PUT    …/<cache>/uploads/<upload>/parts/<number>   bytes, with Content-Digest         send a part (push)
    POST   …/<cache>/uploads/<upload>/parts/<number>   SignRequest -> SignAnswer          send it elsewhere (push)
    POST   …/<cache>/uploads/<upload>/file             FileRequest -> FileAnswer          send it in one piece (push)
    POST   …/<cache>/uploads/<upload>/complete         CompleteRequest -> CompleteAnswer  make a NAR of the parts (push)
    DELETE …/<cache>/uploads/<upload>                                                     forget the parts (push)

A NAR is sent before its path is published, by `PUT /<cache>/nar/<NAR hash>.nar.zst` (`application/x-nix-nar`): named
by its NAR hash, so that an equal NAR is sent once. The server checks it while it streams, and answers a NAR that it
already has without reading it when the client asks first by `Expect: 100-continue` or HEAD.

A NAR of more than `CacheAnswer.part_size` bytes is sent in parts, so that no proxy on the way finds a body too large
and what has arrived need not be sent again. The client names the upload (16 to 64 of `0-9a-z`): who names it by the
NAR and by all that the bytes of the parts depend on can take it up after any interruption, from any machine, and two
who send the same NAR share the work. Parts have numbers from 1 to MAX_PARTS and come in any order, several at once,
each with `Content-Digest: sha-256=:<base64>:` (RFC 9530); a part that is there already is known by its sha256.
`complete` names the parts that make up the NAR, which is then checked as any other; where that takes long the answer is
`verifying`, and the client asks again. Parts that nothing is added to for some days are removed.

A server whose storage clients can reach may offer (`UploadAnswer.direct`, to those who say that they can) that the
parts go there instead: each is sent as SignAnswer says, and known by the `ETag` of the answer, by which `complete`
names it. It counts no sooner: the server reads back and checks what is there, part by part where it is told their MD5,
and publishes a copy of it. A NAR that would be a single part there is not begun: `file` says where its compressed file
goes in one piece, and `complete` names that piece, with its MD5 and size.

Small NARs are sent many at a time, where `CacheAnswer.packs` says so, in a pack (`application/x-cachesrv-pack`; see
`cachesrv.pack` for its form): the NARs, compressed with zstd, and the paths to publish as soon as they are there. Each
NAR is checked as a single one is; one that is refused is named and does not hurt the others. A pack can be sent again
at any time: what is there already is left as it is.

Fields may be added: readers pass over those that they do not know. `MAX_BATCH` bounds the paths of one request.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MAX_BATCH = 5000
"""Paths in one request, at most."""

MAX_PARTS = 100_000
"""Parts of one NAR, at most."""

MAX_NAMES = 64
"""Names of uploads in one request, at most."""

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
    compressed file, 0 for no limit; `part_size`: bytes of the largest body that a client is to send where it can help
    it, 0 where NARs cannot be sent in parts; `packs`: None where small NARs are sent one by one;
    `direct`: parts, and NARs in one piece, may be sent elsewhere, by who asks for it.
    """

    name: str
    store_dir: str
    priority: int
    public: bool
    public_keys: list[str]
    upstreams: list[UpstreamAnswer]
    max_nar_size: int
    part_size: int = 0
    packs: PackLimits | None = None
    direct: bool = False


class PackLimits(msgspec.Struct, frozen=True):
    """What a pack may hold: so many NARs, `size` bytes of files in all, NARs of `nar_size` bytes, compressed or not,
    and a head of `head_size` bytes.
    """

    nars: int
    size: int
    nar_size: int
    head_size: int


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
    """Which of these does the cache not have? `realisations` by the names of their objects, `realisations/<id>.doi` or
    `build-trace-v2/<derivation>/<output>.doi`; they are put there after what they lead to is published.
    """

    paths: list[WantedPath]
    realisations: list[str] = []


class PublishedOtherwise(msgspec.Struct, frozen=True):
    """A path that is published with another NAR than the client has."""

    path: str
    published_nar_hash: str


class MissingAnswer(msgspec.Struct, frozen=True):
    """Base names. `missing`: not published; `stored`: those of them whose NAR is here already and needs no sending;
    `conflicts`: published, with another NAR hash; `realisations`: those that are not here.
    """

    missing: list[str]
    stored: list[str]
    conflicts: list[PublishedOtherwise]
    realisations: list[str] = []


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


class BegunRequest(msgspec.Struct, frozen=True):
    """Names of uploads, at most MAX_NAMES: for who can make other bytes of the same NAR, and wants to take up what was
    begun.
    """

    uploads: list[str]


class BegunAnswer(msgspec.Struct, frozen=True):
    """Those that were begun, and are neither complete nor removed."""

    begun: list[str]


class UploadRequest(msgspec.Struct, frozen=True):
    """The NAR that is to be sent in parts, compressed with zstd: its `sha256:<nix32>`, and its size in bytes, 0 where
    that is not known. `direct`: the client can send them elsewhere.
    """

    nar_hash: str
    nar_size: Annotated[int, msgspec.Meta(ge=0)]
    direct: bool = False


class UploadedPart(msgspec.Struct, frozen=True, array_like=True):
    """A part that is there: `size` in bytes, `sha256` in base-16."""

    number: int
    size: int
    sha256: str


class DirectPart(msgspec.Struct, frozen=True, array_like=True):
    """A part that is there: its ETag, without quotes, is mostly its MD5 in base-16."""

    number: int
    etag: str


class DirectAnswer(msgspec.Struct, frozen=True):
    """Parts are to be sent elsewhere: all but the last with `least` bytes or more, at most `most` of them."""

    least: int
    most: int
    parts: list[DirectPart] = []


class UploadAnswer(msgspec.Struct, frozen=True):
    """`stored`: the NAR itself is there, nothing has to be sent. `parts` may have several of one number; with `direct`
    there are none.
    """

    stored: bool
    parts: list[UploadedPart] = []
    direct: DirectAnswer | None = None


class SignRequest(msgspec.Struct, frozen=True):
    """A part that is to be sent elsewhere: its MD5 in base-16."""

    md5: str


class SignAnswer(msgspec.Struct, frozen=True):
    """To be sent there, by PUT, with these headers and no others that say who one is."""

    url: str
    headers: dict[str, str]


class FileRequest(msgspec.Struct, frozen=True):
    """A NAR that is to be sent elsewhere in one piece: its `sha256:<nix32>`; the size in bytes and the MD5 (base-16) of
    the file that it is compressed to with zstd.
    """

    nar_hash: str
    size: Annotated[int, msgspec.Meta(ge=1)]
    md5: str


class FileAnswer(msgspec.Struct, frozen=True):
    """`stored`: the NAR is there, nothing has to be sent. `put` says where the file goes; None where it has to come
    through the server.
    """

    stored: bool
    put: SignAnswer | None = None


class CompleteRequest(msgspec.Struct, frozen=True):
    """The NAR as in the UploadRequest; `parts` are the sha256 (base-16), or the ETags where they were sent elsewhere,
    of all its parts, in order; `md5` are those (base-16) of parts that were sent elsewhere, or none. `size`: bytes of
    the file where it was sent elsewhere in one piece, which is then its only part.
    """

    nar_hash: str
    parts: list[str]
    md5: list[str] = []
    size: Annotated[int, msgspec.Meta(ge=0)] = 0


class CompleteAnswer(msgspec.Struct, frozen=True):
    """`stored`: the NAR is there, checked. `verifying`: ask again; `verified` bytes of the parts have been read so far.
    `incomplete`: nothing has changed, and the parts with the numbers `missing` have to be sent.
    """

    state: Literal["stored", "verifying", "incomplete"]
    missing: list[int] = []
    verified: int = 0


class PackedNar(msgspec.Struct, frozen=True, array_like=True):
    """A NAR in a pack: its `sha256:<nix32>` and size in bytes, and the size of the file that it is compressed to."""

    nar_hash: str
    nar_size: Annotated[int, msgspec.Meta(ge=0)]
    file_size: Annotated[int, msgspec.Meta(ge=0)]


class PackHead(msgspec.Struct, frozen=True):
    """What a pack begins with. `paths` are published when the NARs of the pack are there, each after those that it
    refers to; their NARs need not be among those of the pack.
    """

    nars: list[PackedNar]
    paths: list[PathToPublish] = []


class NarOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """`error` is None when the NAR is there, by this request or before it; `kind` as in PathOutcome."""

    nar_hash: str
    error: str | None = None
    kind: str | None = None


class PackAnswer(msgspec.Struct, frozen=True):
    """One outcome a NAR and one a path, in the order of the head."""

    nars: list[NarOutcome]
    paths: list[PathOutcome]
