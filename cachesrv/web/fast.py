"""Answers to plain requests, from bytes to bytes: narinfos from the index, small NARs from their files.

What is made here has to be what the handlers of `cachesrv.web.cache` make; a test compares the two to the byte.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING

from cachesrv.index.base import ABSENT, head_of
from cachesrv.nix.store_path import is_hash_part
from cachesrv.web.app import SERVER
from cachesrv.web.cache import MISS_HEADERS, MISS_TEXT, NAR_TYPE
from cachesrv.web.known import ABSENT as KNOWN_ABSENT
from cachesrv.web.objects import IMMUTABLE
from cachesrv.web.open_files import OpenFiles
from cachesrv.web.plain import Blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachesrv.services.caches import ServedCache
    from cachesrv.web.open_files import OpenFile
    from cachesrv.web.plain import Block
    from cachesrv.web.site import Rules, Site

SMALL_NAR = 512 * 1024
"""Bytes up to which a NAR leaves in one write."""
WARM_NAR = 4 * 1024 * 1024
"""Bytes up to which a NAR is sent from its file in the loop, once all of it is in memory."""
MANY_SLOW = 64
"""Clients that do not take their answers, over which no further NARs are read into memory."""

_NAR_NAME = re.compile(rb"[0-9A-Za-z][0-9A-Za-z_.-]{0,199}\Z")
_NARINFO_LINE = re.compile(rb"GET /(?:([0-9A-Za-z_-]+)/)?([0-9a-df-np-sv-z]{32})\.narinfo HTTP/1\.1")
_NAR_LINE = re.compile(rb"GET /(?:([0-9A-Za-z_-]+)/)?nar/([0-9A-Za-z][0-9A-Za-z_.-]{0,199}) HTTP/1\.1")
_LINE = re.compile(rb"(?:GET|HEAD) /[!-~]* HTTP/1\.1")
_GET, _HEAD = b"GET /", b"HEAD /"
_VERSION, _OLD_VERSION = b" HTTP/1.1", b" HTTP/1.0"
_CLOSE = b"\r\nConnection: close\r\n"
_NARINFO = b".narinfo"


@dataclass(frozen=True, slots=True)
class Form:
    """GET requests for narinfos of one public cache, that are the same but for the hash part: `length` bytes, of which
    `before` come first and `after` last; the key in the index is `prefix` and what stands from `start` to `end`.
    """

    cache: ServedCache
    before: bytes
    after: bytes
    length: int
    prefix: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """An answer whose body is a file: `head`, then `size` bytes of `descriptor`, which is good until the event loop
    goes on.
    """

    head: bytes
    descriptor: int
    size: int


class FastAnswers:
    """What can be answered at once. `slow`: how many clients do not take their answers at present."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._delivery = site.services.delivery
        self._raw = site.services.index.raw
        self.snapshot = site.services.index.snapshot
        self._lookup = site.services.lookup
        self._usage = site.services.usage
        self._blocks = Blocks()
        metrics = site.services.metrics
        self._cells = metrics.cells
        self._sent = metrics.counter_cell("sent_bytes")
        self._cell = {
            (method, route, status): metrics.request_cell(method, route, status)
            for method in ("GET", "HEAD")
            for route in ("narinfo", "nar")
            for status in (200, 404)
        }
        self._hit_cell = self._cell["GET", "narinfo", 200]
        self._miss_cell = self._cell["GET", "narinfo", 404]
        self._nar_cell = self._cell["GET", "nar", 200]
        self._files = OpenFiles()
        self.slow = 0
        self._rules: Rules | None = None
        self._told: Rules | None = None
        self._caches: dict[bytes, ServedCache] = {}
        self._root: ServedCache | None = None
        self.tick()

    def tick(self) -> None:
        """Once a second: the date in the answers, and the rules that hold now."""
        self._files.expire()
        self.now = time.time()
        common = f"Date: {formatdate(self.now, usegmt=True)}\r\nServer: {SERVER}\r\n"
        self.ok = f"HTTP/1.1 200 OK\r\n{common}".encode()
        fields = "".join(f"{name}: {value}\r\n" for name, value in MISS_HEADERS.items())
        fields += f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(MISS_TEXT)}\r\n"
        self.miss_head = f"HTTP/1.1 404 Not Found\r\n{fields}{common}\r\n".encode()
        self.miss = self.miss_head + MISS_TEXT.encode()

    def refresh(self) -> bool:
        """Whether other rules hold than when this was last asked: forms that were found before hold no more."""
        if self._site.rules is self._told:
            return False
        self._told = self._site.rules
        self._adopt(self._told)
        self._files.close()
        return True

    def find(
        self, get: Callable[[bytes], bytes | None], cache: ServedCache, key: bytes, hash_part: bytes
    ) -> tuple[bytes, float] | None:
        """What is `Known` of a path, which `get` looks up in the index by its `key`, and until when in seconds since
        the epoch; None when the sources have to be asked.
        """
        try:
            value = get(key)
        except Exception:  # noqa: BLE001  whatever it was, the handlers meet it too, and have words for it
            return None
        if value and value[0] != ABSENT:
            self._usage.add(key)
            return value, math.inf
        if value and self._lookup.believes(until := int.from_bytes(value[1:], "big"), self.now):
            return KNOWN_ABSENT, until
        return (KNOWN_ABSENT, math.inf) if self._lacks(cache, hash_part) else None

    def _lacks(self, cache: ServedCache, hash_part: bytes) -> bool:
        """Whether it is certain at once that the path is absent, of which the index knows nothing."""
        text = hash_part.decode("latin-1")
        return is_hash_part(text) and self._lookup.lacks(cache, text)

    def count(self, hits: int, misses: int) -> None:
        """So many GET requests for narinfos were answered by what `find` gave."""
        if hits:
            self._cells[self._hit_cell] += hits
        if misses:
            self._cells[self._miss_cell] += misses

    def form(self, data: bytes) -> Form | None:
        """The form of the one request that `data` is, None when it has none."""
        line, _, fields = data.partition(b"\r\n")
        match = _NARINFO_LINE.fullmatch(line)
        block = self._blocks.get(fields) if match else None
        if not match or block is None or block.conditional:
            return None
        cache = self._caches.get(match[1]) if match[1] else self._root
        if cache is None or not cache.public:
            return None
        start, end = match.span(2)
        return Form(cache, data[:start], data[end:], len(data), f"{cache.name}/".encode("ascii"), start, end)

    def file(self, data: bytes) -> FileAnswer | None:
        """The answer to the one request that `data` is, if that is a GET for a NAR of a public cache that can be sent
        from its file.
        """
        line, _, fields = data.partition(b"\r\n")
        file = self._files.get(line) or self._open(line)
        block = self._blocks.get(fields) if file else None
        if file is None or block is None or block.conditional:
            return None
        self._cells[self._nar_cell] += 1
        self._cells[self._sent] += file.size
        return FileAnswer(self.ok + file.head, file.descriptor, file.size)

    def _open(self, line: bytes) -> OpenFile | None:
        match = _NAR_LINE.fullmatch(line)
        cache = (self._caches.get(match[1]) if match[1] else self._root) if match else None
        if match is None or cache is None or not cache.public:
            return None
        name = match[2].decode("ascii")
        key = cache.key(f"nar/{name}")
        found = self._delivery.warm_file(key, limit=WARM_NAR)
        if found is None:
            return None
        self._usage.add_nar(key)
        return self._files.add(line, *found, _nar_fields(name, found[1]))

    def close(self) -> None:
        """Close the files that are kept open."""
        self._files.close()

    def block(self, data: bytes) -> Block | None:
        """The header fields of the one plain request that `data` is, None when it is anything else."""
        line, _, fields = data.partition(b"\r\n")
        return self._blocks.get(fields) if _LINE.fullmatch(line) else None

    def answer(self, data: bytes) -> bytes | None:
        """The answer to the one request that `data` is, None when it is not for us to answer."""
        line, _, fields = data.partition(b"\r\n")
        if line[-9:] != _VERSION:
            return None
        block = self._blocks.get(fields)
        if block is None or block.conditional:
            return None
        if line[:5] == _GET:
            method, target = "GET", line[5:-9]
        elif line[:6] == _HEAD:
            method, target = "HEAD", line[6:-9]
        else:
            return None
        if target[-8:] == _NARINFO:
            return self._narinfo(method, target[:-8], block)
        return self._nar(method, target, block)

    def last(self, data: bytes) -> bytes | None:
        """The answer to the one request that `data` is and that ends its connection: because it says so, or is of
        HTTP/1.0, as those of nginx are where it is not told otherwise.
        """
        line, _, fields = data.partition(b"\r\n")
        version = line[-9:]
        closes = _CLOSE in data
        if version not in (_VERSION, _OLD_VERSION) or not (closes or version == _OLD_VERSION):
            return None
        if not closes and b"\r\nconnection:" in data.lower():
            return None
        answer = self.answer((line[:-9] + _VERSION + b"\r\n" + fields).replace(_CLOSE, b"\r\n", 1))
        if answer is None:
            return None
        status, _, rest = answer.partition(b"\r\n")
        if version == _OLD_VERSION:
            return b"".join((version[1:], status[8:], b"\r\n", rest))
        return b"".join((status, _CLOSE, rest))

    def _narinfo(self, method: str, target: bytes, block: Block) -> bytes | None:
        """`target` is `<cache>/<hash part>` or `<hash part>`; what is not well-formed is not found in the index."""
        rules = self._site.rules
        if rules is not self._rules:
            self._adopt(rules)
        slash = target.find(b"/")
        if slash >= 0:
            cache = self._caches.get(target[:slash])
            key = target
        else:
            cache = self._root
            key = self._root_prefix + target
        if cache is None or not (cache.public or self._may_read(rules, cache, block)):
            return None
        found = self.find(self._raw, cache, key, target[slash + 1 :])
        if found is None:
            return None
        if value := found[0]:
            self._cells[self._cell[method, "narinfo", 200]] += 1
            return self.ok + (value if method == "GET" else head_of(value))
        self._cells[self._cell[method, "narinfo", 404]] += 1
        return self.miss if method == "GET" else self.miss_head

    def _nar(self, method: str, target: bytes, block: Block) -> bytes | None:
        """`target` is `<cache>/nar/<file>` or `nar/<file>`."""
        directory, slash, name = target.rpartition(b"/")
        if not slash or not _NAR_NAME.match(name) or self.slow > MANY_SLOW:
            return None
        rules = self._site.rules
        if rules is not self._rules:
            self._adopt(rules)
        if directory == b"nar":
            cache = self._root
        elif directory.endswith(b"/nar"):
            cache = self._caches.get(directory[:-4])
        else:
            return None
        if cache is None or not (cache.public or self._may_read(rules, cache, block)):
            return None
        text = name.decode("ascii")
        key = cache.key(f"nar/{text}")
        content = self._delivery.at_once(key, limit=SMALL_NAR)
        if content is None:
            return None
        self._usage.add_nar(key)
        self._cells[self._cell[method, "nar", 200]] += 1
        head = _nar_fields(text, len(content))
        if method == "HEAD":
            return self.ok + head
        self._cells[self._sent] += len(content)
        return b"".join((self.ok, head, content))

    def _may_read(self, rules: Rules, cache: ServedCache, block: Block) -> bool:
        """One look into the memory of verified tokens; who is not in it is for aiohttp's handlers."""
        if block.token is None:
            return False
        principal = rules.access.remembered(block.token)
        return principal is not None and principal.may("pull", cache.name)

    def _adopt(self, rules: Rules) -> None:
        self._caches = {name.encode("ascii"): cache for name, cache in rules.caches.items()}
        self._root = rules.root
        self._root_prefix = f"{rules.root.name}/".encode("ascii") if rules.root else b""
        self._rules = rules


def _nar_fields(name: str, size: int) -> bytes:
    """The header fields of an answer that carries a NAR."""
    return (
        f"Content-Type: {NAR_TYPE}\r\nCache-Control: {IMMUTABLE}\r\nAccept-Ranges: bytes\r\n"
        f'ETag: "{name}"\r\nContent-Length: {size}\r\n\r\n'
    ).encode("ascii")
