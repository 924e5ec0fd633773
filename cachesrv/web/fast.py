"""Answers to plain requests, from bytes to bytes: narinfos from the index, small NARs from their files.

What is made here has to be what the handlers of `cachesrv.web.cache` make; a test compares the two to the byte.
"""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.index.base import PRESENT
from cachesrv.web.app import SERVER
from cachesrv.web.cache import MISS_HEADERS, MISS_TEXT, NAR_TYPE
from cachesrv.web.objects import IMMUTABLE
from cachesrv.web.plain import Blocks

if TYPE_CHECKING:
    from cachesrv.services.caches import ServedCache
    from cachesrv.web.plain import Block
    from cachesrv.web.site import Rules, Site

SMALL_NAR = 512 * 1024
"""Bytes up to which a NAR leaves in one write."""
MANY_SLOW = 64
"""Clients that do not take their answers, over which no further NARs are read into memory."""

_NAR_NAME = re.compile(rb"[0-9A-Za-z][0-9A-Za-z_.-]{0,199}\Z")
_LINE = re.compile(rb"(?:GET|HEAD) /[!-~]* HTTP/1\.1")
_GET, _HEAD = b"GET /", b"HEAD /"
_VERSION = b" HTTP/1.1"
_NARINFO = b".narinfo"


class FastAnswers:
    """What can be answered at once. `slow`: how many clients do not take their answers at present."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._delivery = site.services.delivery
        self._raw = site.services.index.raw
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
        self.slow = 0
        self._rules: Rules | None = None
        self._caches: dict[bytes, ServedCache] = {}
        self._root: ServedCache | None = None
        self.tick()

    def tick(self) -> None:
        """Once a second: the date in the answers, and the rules that hold now."""
        self._now = time.time()
        common = f"Date: {formatdate(self._now, usegmt=True)}\r\nServer: {SERVER}\r\n"
        self._ok = f"HTTP/1.1 200 OK\r\n{common}".encode()
        fields = "".join(f"{name}: {value}\r\n" for name, value in MISS_HEADERS.items())
        fields += f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(MISS_TEXT)}\r\n"
        self._miss_head = f"HTTP/1.1 404 Not Found\r\n{fields}{common}\r\n".encode()
        self._miss = self._miss_head + MISS_TEXT.encode()

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
        try:
            value = self._raw(key)
        except StoreError:
            # Aiohttp's handler meets it too, and has words for it.
            return None
        if not value:
            return None
        if value[0] == PRESENT:
            self._cells[self._cell[method, "narinfo", 200]] += 1
            self._usage.add(key)
            if method == "GET":
                return self._ok + value[3:]
            return self._ok + value[3 : 3 + int.from_bytes(value[1:3], "big")]
        if int.from_bytes(value[1:9], "big") <= self._now:
            return None
        self._cells[self._cell[method, "narinfo", 404]] += 1
        return self._miss if method == "GET" else self._miss_head

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
        content = self._delivery.at_once(cache.key(f"nar/{text}"), limit=SMALL_NAR)
        if content is None:
            return None
        self._cells[self._cell[method, "nar", 200]] += 1
        head = (
            f"Content-Type: {NAR_TYPE}\r\nCache-Control: {IMMUTABLE}\r\nAccept-Ranges: bytes\r\n"
            f'ETag: "{text}"\r\nContent-Length: {len(content)}\r\n\r\n'
        ).encode("ascii")
        if method == "HEAD":
            return self._ok + head
        self._cells[self._sent] += len(content)
        return b"".join((self._ok, head, content))

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
