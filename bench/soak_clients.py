"""The clients of a soak: each asks on and on, and holds the server to what it was told before.

Times are compared only as far as they are sure: what a client was told is good from when it asked, less the second by
which the server's whole seconds may be off.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from hashlib import sha256
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cachesrv.nix import narinfo
from tests.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 60.0
_ROUNDING = 1.0
_REMEMBERED = 3_000
_CONTENTS = 500
_LARGEST = 300_000


@dataclass(frozen=True)
class Terms:
    """Seconds, as the server has them: what was used within `lease` stays, its NAR for `grace` after it has gone."""

    lease: int
    grace: int


@dataclass
class World:
    """What all clients know, and what went wrong."""

    url: str
    token: str
    terms: Terms
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    _pushed: deque[Sample] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, sample: Sample) -> None:
        """It was pushed."""
        with self._lock:
            self._pushed.append(sample)

    def all(self) -> list[Sample]:
        """The paths that were pushed, the latest last."""
        with self._lock:
            return list(self._pushed)

    def known(self, chance: random.Random, number: int) -> list[Sample]:
        """Some of them, mostly late ones."""
        there = self.all()
        return [there[-1 - int(len(there) * chance.random() ** 3)] for _ in range(number if there else 0)]


class Client(threading.Thread):
    """One connection, and one thing done on it again and again."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(daemon=True)
        self.world = world
        self.chance = random.Random(seed)
        parts = urlsplit(world.url)
        assert parts.hostname
        self._connection = HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
        self._headers = {"Authorization": f"Bearer {world.token}"}

    def run(self) -> None:
        try:
            while not self.world.stop.is_set():
                self.step()
        except Exception as error:  # noqa: BLE001  whatever it was, the soak has failed
            self.violation(f"{type(self).__name__}: {error!r}")
        finally:
            self._connection.close()

    def step(self) -> None:
        raise NotImplementedError

    def violation(self, text: str) -> None:
        self.world.violations.append(text)
        self.world.stop.set()

    def count(self, what: str) -> None:
        self.world.counts[what] += 1

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body. Whatever breaks off is a violation: nobody ends the server."""
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.status >= 500 and response.status != 503:
            self.violation(f"{method} {path}: {response.status} {data[:200]!r}")
        return response.status, data

    def is_there(self, sample: Sample) -> bool:
        return self.ask("GET", sample.narinfo_url)[0] == 200


class Pusher(Client):
    """Pushes new paths, and those that have gone, which refer to what it was just told is there."""

    def step(self) -> None:
        relied, until = self._rely(self.world.known(self.chance, self.chance.randrange(4)))
        again = self.world.known(self.chance, 1)
        if again and self.chance.random() < 0.3:
            sample = again[0]
            if set(sample.references) - {one.path for one in relied}:
                relied, until = self._rely([one for one in self.world.all() if one.path in sample.references])
        else:
            content = random.Random(self.chance.randrange(_CONTENTS)).randbytes(self.chance.randrange(1, _LARGEST))
            references = tuple(sorted({one.path for one in relied}))
            sample = Sample(f"path-{self.chance.getrandbits(64):x}", content, references)
        if set(sample.references) <= {one.path for one in relied}:
            self._push(sample, until)

    def _rely(self, samples: Sequence[Sample]) -> tuple[list[Sample], float]:
        """Those of them that the server says are there, and how long they are."""
        asked = time.monotonic()
        wanted = {"paths": [[one.path.base_name, one.nar_hash.nix32, len(one.nar)] for one in samples]}
        status, body = self.ask("POST", "/api/v1/caches/main/missing", json.dumps(wanted).encode())
        assert status == 200, body
        missing = set(json.loads(body)["missing"])
        return [one for one in samples if one.path.base_name not in missing], asked + self.world.terms.lease - _ROUNDING

    def _push(self, sample: Sample, until: float) -> None:
        for name, body in ((sample.nar_url, sample.file), (sample.narinfo_url, sample.narinfo())):
            asked = time.monotonic()
            status, text = self.ask("PUT", name, body)
            if status == 503:
                self.count("sent away")
                return
            if status != 204:
                if time.monotonic() < until:
                    self.violation(f"what a push was told is not so: {name}: {status} {text!r}")
                self.count("pushed too late")
                return
        self.world.add(sample)
        self.count("pushed")
        if not self.is_there(sample) and time.monotonic() < asked + self.world.terms.lease - _ROUNDING:
            self.violation(f"{sample.path} was acknowledged and is not there")


class Downloader(Client):
    """Takes closures."""

    def step(self) -> None:
        for root in self.world.known(self.chance, 1) or self._rest():
            self._take(root.path.hash_part)

    def _rest(self) -> list[Sample]:
        time.sleep(0.01)
        return []

    def _take(self, root: str) -> None:
        ahead, seen = [(root, "")], {root}
        while ahead:
            hash_part, referrer = ahead.pop()
            asked = time.monotonic()
            status, body = self.ask("GET", f"/main/{hash_part}.narinfo")
            self.count("narinfos found" if status == 200 else "narinfos not found")
            if status != 200:
                if referrer and self._is_a_hole(hash_part, referrer):
                    self.violation(f"{referrer} is there without {hash_part}")
                continue
            info = narinfo.parse(body)
            self._fetch(info, asked + self.world.terms.grace - _ROUNDING)
            new = {path.hash_part for path in info.references} - seen
            ahead += [(other, hash_part) for other in new]
            seen |= new

    def _is_a_hole(self, hash_part: str, referrer: str) -> bool:
        """Whether a path is there without another one: not because both have gone, or have come again since."""
        for _ in range(4):
            if self.ask("GET", f"/main/{referrer}.narinfo")[0] != 200:
                return False
            if self.ask("GET", f"/main/{hash_part}.narinfo")[0] == 200:
                return False
        return True

    def _fetch(self, info: narinfo.NarInfo, until: float) -> None:
        """A NAR, bit by bit."""
        self._connection.request("GET", f"/main/{info.url}", headers=self._headers)
        response = self._connection.getresponse()
        if response.status != 200:
            response.read()
            if time.monotonic() < until:
                self.violation(f"{info.store_path} is there without its NAR: {response.status}")
            self.count("NARs that came too late")
            return
        digest, size = sha256(), 0
        try:
            while data := response.read(1 << 16):
                digest.update(data)
                size += len(data)
                if self.chance.random() < 0.02:
                    time.sleep(0.1)
        except HTTPException as error:
            self.violation(f"the NAR of {info.store_path} broke off after {size} bytes: {error!r}")
            return
        if info.file_hash is None or size != info.file_size or digest.digest() != info.file_hash.digest:
            self.violation(f"the NAR of {info.store_path} is another one, or not all of it: {size} bytes")
        self.count("NARs")


class Asker(Client):
    """Looks paths up, those that are there and others."""

    def step(self) -> None:
        for sample in self.world.known(self.chance, 20):
            status, body = self.ask("GET", sample.narinfo_url)
            self.count("lookups")
            if status not in {200, 404}:
                self.violation(f"{sample.narinfo_url}: {status} {body!r}")
        time.sleep(0.005)
