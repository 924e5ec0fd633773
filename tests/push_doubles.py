"""Stand-ins for both ends of a push: a local store of temporary files, and a cache server that can be made to fail."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from dataclasses import dataclass, field, replace
from hashlib import md5, sha256
from typing import TYPE_CHECKING, TypeVar

import msgspec
import zstandard
from aiohttp import web
from aiohttp.test_utils import TestServer

from cachesrv import api, pack
from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar_writer import dump
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.nix.store_path import StorePath
from cachesrv.push.connection import Timeouts
from tests.fake_upstream import KEY

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
    from pathlib import Path
    from typing import Self

    from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput
    from cachesrv.nix.signing import SecretKey

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

Body = TypeVar("Body")

STORE_DIR = "/nix/store"
PLENTY = Timeouts(connect=60, answer=60, stall=60, store=60)
"""Of time, where nothing is silent on purpose: machines may be busy."""
HURRY = Timeouts(connect=60, answer=2, stall=2, store=2)
"""Where something is."""


def store_path(name: str) -> StorePath:
    """A path with this name; equal names, equal paths."""
    digits = hashlib.sha256(name.encode()).hexdigest()[:32].replace("e", "z")
    return StorePath(digits, name)


def path_info(name: str, references: Iterable[str] = (), nar: str | None = None, size: int = 100) -> PathInfo:
    """Of a path that does not exist; `nar` tells NARs apart, by default the name does."""
    return PathInfo(
        store_path=store_path(name),
        nar_hash=Hash.of("sha256", (nar or name).encode()),
        nar_size=size,
        references=tuple(sorted(store_path(other) for other in references)),
    )


def signed_narinfo(info: PathInfo, key: SecretKey = KEY) -> NarInfo:
    """What a cache that has the path would say of it."""
    unsigned = NarInfo(
        store_path=info.store_path,
        store_dir=STORE_DIR,
        url=f"nar/{info.nar_hash.bare_nix32}.nar",
        compression="none",
        file_hash=None,
        file_size=None,
        nar_hash=info.nar_hash,
        nar_size=info.nar_size,
        references=info.references,
        deriver=None,
        signatures=(),
        ca=None,
    )
    return replace(unsigned, signatures=(key.sign(unsigned.fingerprint),))


class TemporaryStore:
    """A `LocalStore` in a directory: `add` files to it."""

    def __init__(self, directory: Path) -> None:
        self.store_dir = STORE_DIR
        self.name = "temporary store"
        self.directory = directory
        self.infos: dict[StorePath, PathInfo] = {}
        self.unreadable: set[StorePath] = set()
        self.realised: dict[OutputId | TracedOutput, Realisation] = {}

    def add(self, name: str, contents: bytes | Mapping[str, bytes] = b"", references: Iterable[str] = ()) -> PathInfo:
        """A file, or a directory of files."""
        path = store_path(name)
        file = self.directory / path.base_name
        if isinstance(contents, bytes):
            file.write_bytes(contents)
        else:
            file.mkdir()
            for member, data in contents.items():
                (file / member).write_bytes(data)
        nar = b"".join(dump(file))
        others = tuple(sorted(store_path(other) for other in references))
        self.infos[path] = PathInfo(path, Hash.of("sha256", nar), len(nar), others)
        return self.infos[path]

    def file(self, name: str) -> Path:
        return self.directory / store_path(name).base_name

    async def resolve(self, path: str) -> StorePath:
        if path.startswith("nowhere"):
            raise NotFound(f"{path!r} leads nowhere")
        return StorePath.parse_full(path, STORE_DIR)

    def real_path(self, path: StorePath) -> str | None:
        return None if path in self.unreadable else str(self.directory / path.base_name)

    async def path_info(self, path: StorePath) -> PathInfo:
        if path not in self.infos:
            raise NotFound(f"{path.full(STORE_DIR)} is not valid")
        return self.infos[path]

    async def closure(self, paths: Iterable[StorePath]) -> list[PathInfo]:
        found: dict[StorePath, PathInfo] = {}
        pending = list(paths)
        while pending:
            info = await self.path_info(pending.pop())
            if info.store_path not in found:
                found[info.store_path] = info
                pending += info.references
        return in_reference_order(found.values())

    async def nar(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        for chunk in dump(self.directory / info.store_path.base_name, chunk_size=1000):
            yield chunk
            await asyncio.sleep(0)

    async def realisations(self, paths: Iterable[StorePath]) -> Mapping[OutputId | TracedOutput, Realisation]:
        wanted = set(paths)
        return {output: one for output, one in self.realised.items() if one.out_path in wanted}

    async def close(self) -> None:
        pass


@dataclass
class FakeCache:
    """The cache `main`, as `cachesrv.api` describes it. `faults` answer before it does, each once, by route:
    `cache`, `missing`, `paths`, `nar`, `pack`, and for parts `begun`, `begin`, `part`, `complete`, `abort`. `part_size`
    is what it takes in one part, 0 for none; `uploads` has the parts of each upload by number; `slow` is how often
    `complete` says first that it takes longer. It takes packs within the limits `packs`, if any; it refuses those NARs
    of a pack whose hash is in `unpackable`. `direct`: parts go to a bucket, with the routes `sign` (`file` for NARs
    in one piece) and `bucket`; they are to have so many bytes or more, all but the last, and there are at most so
    many, as `direct_limits` says; `seen_by_bucket` are the headers that it has seen. It `bears` so many requests at
    once, 0 for any number, and answers 503 to others; `crowds` has how many there were when each came. It `takes`
    bodies of so many bytes, 0 for any size, and answers 413 to others; `sizes` has those of all then.
    """

    token: str | None = "secret"
    store_dir: str = STORE_DIR
    max_nar_size: int = 0
    part_size: int = 0
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    slow: int = 0
    direct: bool = False
    direct_limits: tuple[int, int] = (5 * 2**20, 10_000)
    seen_by_bucket: list[Mapping[str, str]] = field(default_factory=list)
    packs: api.PackLimits | None = None
    bears: int = 0
    crowds: list[int] = field(default_factory=list)
    takes: int = 0
    sizes: list[int] = field(default_factory=list)
    unpackable: set[str] = field(default_factory=set)
    upstreams: list[api.UpstreamAnswer] = field(default_factory=list)
    nars: dict[str, bytes] = field(default_factory=dict)
    published: dict[str, api.PathToPublish] = field(default_factory=dict)
    realisations: dict[str, bytes] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    faults: dict[str, list[Handler]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)
    publication: asyncio.Event = field(default_factory=asyncio.Event)
    tls: ssl.SSLContext | None = None
    _server: TestServer | None = None
    _under_way: int = 0

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=api.MAX_REQUEST_SIZE)
        app.router.add_get("/api/v1/caches/main", self._route("cache", self._cache))
        app.router.add_post("/api/v1/caches/main/missing", self._route("missing", self._missing))
        app.router.add_post("/api/v1/caches/main/paths", self._route("paths", self._publish))
        app.router.add_post("/api/v1/caches/main/nars", self._route("pack", self._pack))
        app.router.add_put("/main/nar/{file}", self._route("nar", self._put))
        app.router.add_put("/main/realisations/{file}", self._route("realisation", self._realise))
        app.router.add_post("/api/v1/caches/main/uploads", self._route("begun", self._begun))
        upload = "/api/v1/caches/main/uploads/{upload}"
        app.router.add_put(upload, self._route("begin", self._begin))
        app.router.add_put(upload + "/parts/{number}", self._route("part", self._part))
        app.router.add_post(upload + "/parts/{number}", self._route("sign", self._sign))
        app.router.add_post(upload + "/file", self._route("file", self._file))
        app.router.add_put("/bucket/{upload}/{number}", self._route("bucket", self._bucket, open_to_all=True))
        app.router.add_post(upload + "/complete", self._route("complete", self._complete))
        app.router.add_delete(upload, self._route("abort", self._abort))
        self._server = TestServer(app, scheme="http" if self.tls is None else "https")
        await self._server.start_server(auto_decompress=False, shutdown_timeout=0.01, ssl=self.tls)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        await self._server.close()

    @property
    def url(self) -> str:
        assert self._server is not None
        return str(self._server.make_url("/main"))

    def fail(self, route: str, *faults: Handler) -> None:
        """Let the next requests to `route` go to these."""
        self.faults.setdefault(route, []).extend(faults)

    def count(self, route: str) -> int:
        return self.requests.count(route)

    def _route(self, name: str, handler: Handler, *, open_to_all: bool = False) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.requests.append(name)
            if self.faults.get(name):
                return await self.faults[name].pop(0)(request)
            known = request.headers.get("Authorization") == f"Bearer {self.token}"
            if self.token is not None and not open_to_all and not known:
                return web.json_response({"error": "no valid token"}, status=401)
            return await handler(request)

        return self._crowded(handle)

    def _crowded(self, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._under_way += 1
            self.crowds.append(self._under_way)
            try:
                if 0 < self.bears < self._under_way:
                    return await answer(503, "too many")(request)
                if self.takes and await self._size(request) > self.takes:
                    return await answer(413, "<html>too large</html>")(request)
                return await handler(request)
            finally:
                self._under_way -= 1

        return handle

    async def _size(self, request: web.Request) -> int:
        """Of the body."""
        size = len(await request.read()) if request.content_length is None else request.content_length
        self.sizes.append(size)
        return size

    async def _cache(self, request: web.Request) -> web.Response:
        return _json(
            api.CacheAnswer(
                "main",
                self.store_dir,
                30,
                public=True,
                public_keys=[],
                upstreams=self.upstreams,
                max_nar_size=self.max_nar_size,
                part_size=self.part_size,
                packs=self.packs,
                direct=self.direct,
            )
        )

    async def _missing(self, request: web.Request) -> web.Response:
        asked = await _body(request, api.MissingRequest)
        paths = asked.paths
        assert len(paths) + len(asked.realisations) <= api.MAX_BATCH
        absent = [path for path in paths if path.path not in self.published]
        there = {path.path: self.published[path.path].nar_hash for path in paths if path.path in self.published}
        return _json(
            api.MissingAnswer(
                [path.path for path in absent],
                [path.path for path in absent if path.nar_hash in self.nars],
                [
                    api.PublishedOtherwise(p.path, there[p.path])
                    for p in paths
                    if there.get(p.path, "") not in ("", p.nar_hash)
                ],
                [name for name in asked.realisations if name not in self.realisations],
            )
        )

    async def _publish(self, request: web.Request) -> web.Response:
        paths = (await _body(request, api.PublishRequest)).paths
        assert len(paths) <= api.MAX_BATCH
        self.batches.append([path.path for path in paths])
        return _json(api.PublishAnswer([self._publish_one(path) for path in paths]))

    def _publish_one(self, path: api.PathToPublish) -> api.PathOutcome:
        if path.nar_hash not in self.nars:
            return api.PathOutcome(path.path, "its NAR is not here", "missing-nar")
        lacking = set(path.references) - self.published.keys() - {path.path} - self.elsewhere
        if lacking:
            return api.PathOutcome(path.path, f"refers to {min(lacking)}", "missing-references")
        self.published[path.path] = path
        self.publication.set()
        return api.PathOutcome(path.path)

    async def _pack(self, request: web.Request) -> web.Response:
        assert self.packs is not None
        received = pack.decode(await request.read(), self.packs)
        outcomes = [self._unpack(*one) for one in zip(received.head.nars, received.files, strict=True)]
        paths = received.head.paths
        self.batches.append([path.path for path in paths])
        return _json(api.PackAnswer(outcomes, [self._publish_one(path) for path in paths]))

    def _unpack(self, sent: api.PackedNar, file: memoryview) -> api.NarOutcome:
        if sent.nar_hash in self.unpackable:
            return api.NarOutcome(sent.nar_hash, "not in a pack", "bad-input")
        nar = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(file)
        assert (Hash.of("sha256", nar).nix32, len(nar)) == (sent.nar_hash, sent.nar_size)
        self.nars[sent.nar_hash] = bytes(file)
        return api.NarOutcome(sent.nar_hash)

    async def _put(self, request: web.Request) -> web.Response:
        return self._take(_nar_hash(request), await request.read())

    async def _begun(self, request: web.Request) -> web.Response:
        asked = await _body(request, api.BegunRequest)
        return _json(api.BegunAnswer([name for name in asked.uploads if name in self.uploads]))

    async def _begin(self, request: web.Request) -> web.Response:
        asked = await _body(request, api.UploadRequest)
        if asked.nar_hash in self.nars:
            return _json(api.UploadAnswer(stored=True))
        there = self.uploads.setdefault(request.match_info["upload"], {})
        if asked.direct and self.direct:
            tags = [api.DirectPart(number, _tag(data)) for number, data in there.items()]
            return _json(api.UploadAnswer(stored=False, direct=api.DirectAnswer(*self.direct_limits, tags)))
        parts = [api.UploadedPart(number, len(data), sha256(data).hexdigest()) for number, data in there.items()]
        return _json(api.UploadAnswer(stored=False, parts=parts))

    async def _part(self, request: web.Request) -> web.Response:
        data = await request.read()
        there = self.uploads.get(request.match_info["upload"])
        if there is None:
            return web.json_response({"error": "there is no such upload"}, status=404)
        assert len(data) <= self.part_size
        assert request.content_length == len(data)
        assert request.headers["Content-Digest"] == f"sha-256=:{b64encode(sha256(data).digest()).decode()}:"
        there[int(request.match_info["number"])] = data
        return web.Response(status=204)

    async def _sign(self, request: web.Request) -> web.Response:
        asked = await _body(request, api.SignRequest)
        return _json(self._signed(request.match_info["upload"], request.match_info["number"], asked.md5))

    async def _file(self, request: web.Request) -> web.Response:
        asked = await _body(request, api.FileRequest)
        if asked.nar_hash in self.nars:
            return _json(api.FileAnswer(stored=True))
        if not self.direct:
            return _json(api.FileAnswer(stored=False))
        upload = request.match_info["upload"]
        self.uploads[upload] = {}
        return _json(api.FileAnswer(stored=False, put=self._signed(upload, "1", asked.md5)))

    def _signed(self, upload: str, number: str, md5: str) -> api.SignAnswer:
        url = self.url.replace("/main", f"/bucket/{upload}/{number}?X-Amz-Signature=a%2Fb")
        headers = {"Content-MD5": b64encode(bytes.fromhex(md5)).decode(), "Cookie": "not to be sent"}
        return api.SignAnswer(url, headers)

    async def _bucket(self, request: web.Request) -> web.Response:
        data = await request.read()
        self.seen_by_bucket.append(request.headers)
        if request.match_info["upload"] not in self.uploads:
            return web.Response(status=404, text="<Error><Code>NoSuchUpload</Code></Error>")
        assert request.headers["Content-MD5"] == b64encode(md5(data).digest()).decode()
        assert "X-Amz-Signature=a%2Fb" in request.raw_path
        self.uploads[request.match_info["upload"]][int(request.match_info["number"])] = data
        return web.Response(headers={"ETag": f'"{_tag(data)}"'})

    async def _complete(self, request: web.Request) -> web.Response:
        asked = await _body(request, api.CompleteRequest)
        if self.slow:
            self.slow -= 1
            return _json(api.CompleteAnswer("verifying"))
        there = self.uploads.get(request.match_info["upload"], {})
        names = {number: {sha256(data).hexdigest(), _tag(data)} for number, data in there.items()}
        if missing := [number for number, name in enumerate(asked.parts, 1) if name not in names.get(number, ())]:
            return _json(api.CompleteAnswer("incomplete", missing=missing))
        if self.direct and asked.md5:
            assert asked.md5 == [md5(there[number]).hexdigest() for number in sorted(there)]
        if asked.size:
            assert asked.size == len(there[1])
        return self._take(asked.nar_hash, b"".join(there[number] for number in range(1, len(asked.parts) + 1)))

    async def _abort(self, request: web.Request) -> web.Response:
        self.uploads.pop(request.match_info["upload"], None)
        return web.Response(status=204)

    def _take(self, nar_hash: str, body: bytes) -> web.Response:
        try:
            nar = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(body)
        except zstandard.ZstdError:
            return web.Response(status=422, text="that is not zstd\n")
        if Hash.of("sha256", nar).nix32 != nar_hash:
            return web.Response(status=422, text="the NAR has another hash\n")
        self.nars[nar_hash] = body
        return _json(api.CompleteAnswer("stored"))

    async def _realise(self, request: web.Request) -> web.Response:
        self.realisations[f"realisations/{request.match_info['file']}"] = await request.read()
        return web.Response(status=204)


def answer(status: int, text: str = "", **headers: str) -> Handler:
    """A fault: this answer, to a request that was read."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(
            status=status, text=text, headers={name.replace("_", "-"): headers[name] for name in headers}
        )

    return handle


async def drop(request: web.Request) -> web.StreamResponse:
    """A fault: the connection breaks before the body was read."""
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def hang(request: web.Request) -> web.StreamResponse:
    """A fault: nothing is read and nothing answered."""
    await asyncio.sleep(60)
    raise ConnectionResetError


def _tag(data: bytes) -> str:
    """What the bucket calls a part: mostly its MD5."""
    return md5(data).hexdigest() if len(data) == 8 * 2**20 else "the last one"


def _nar_hash(request: web.Request) -> str:
    file = request.match_info["file"]
    assert file.endswith(".nar.zst")
    return f"sha256:{file.removesuffix('.nar.zst')}"


async def _body(request: web.Request, kind: type[Body]) -> Body:
    data = await request.read()
    if request.headers.get("Content-Encoding") == "zstd":
        data = zstandard.ZstdDecompressor().decompress(data)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise BadInput(str(error)) from error


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
