"""What was pushed from this machine, and what build systems ask of it next, without asking the cache.

    with open_pushed(os.environ) as pushed:
        path = pushed.find("/nix/store/…-release")
        if path is not None and (products := path.file("nix-support/hydra-build-products")):
            print(products.size, products.sha256, products.content)

`find` knows what a push of this user sent (see `record` for how long). `read_file` also takes the store here and, last
of all, the cache; how often that was spared is counted:

    data = await read_file("./result/nix-support/hydra-build-products", os.environ)
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.push.record import PushedPath, Reads, Record, record_file
from cachesrv.push.recorded_path import RecordedPath

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cachesrv.nix.listing import ListingNode
    from cachesrv.push.contents import Where
    from cachesrv.push.inspection import SeenFile

RECORD, STORE, CACHE = "record", "store", "cache"
"""Where files are read from; only the last one costs a download."""


@dataclass(frozen=True)
class PushedOutput:
    """A store path (in full) that was pushed from here: `nar_hash` as `sha256:<nix32>`, `nar_size` in bytes, `pushes`
    say to which caches and when, the latest first; `files` are the entries of its `nix-support`, by their names in the
    store path, such as `nix-support/hydra-build-products`.
    """

    path: str
    nar_hash: str
    nar_size: int
    pushes: tuple[PushedPath, ...]
    files: Mapping[str, SeenFile]
    listing: ListingNode | None

    def file(self, name: str) -> SeenFile | None:
        """One of the files; None when the path has no such file."""
        return self.files.get(name)


class Pushed:
    """The record, as it is read. One that is not there is empty, and one that cannot be read says nothing."""

    def __init__(self, record: Record | None) -> None:
        self._record = record

    def find(self, path: str) -> PushedOutput | None:
        """What is known of a store path (in full) and what is in it. None when that is not on record: it was not pushed
        from here, or too long ago, or its NAR did not go by here, since the cache had it of another path.
        """
        if self._record is None:
            return None
        with suppress(StoreError):
            pushes = self._record.find(path)
            if pushes and self._record.has_seen(pushes[0].nar_hash):
                return self._output(self._record, pushes)
        return None

    def pushes(self, path: str) -> list[PushedPath]:
        """Those of a store path (in full), the latest first."""
        with suppress(StoreError):
            return self._record.find(path) if self._record is not None else []
        return []

    def paths(self) -> list[PushedPath]:
        """All pushes on record, the latest first."""
        with suppress(StoreError):
            return self._record.paths() if self._record is not None else []
        return []

    def reads(self) -> Mapping[str, Reads]:
        """How often files of paths were read, and how many bytes, by where they came from: RECORD, STORE or CACHE. All
        but the last were downloads avoided.
        """
        with suppress(StoreError):
            return self._record.reads() if self._record is not None else {}
        return {}

    def count(self, source: str, size: int) -> None:
        """Something of `size` bytes was read from `source`."""
        with suppress(StoreError):  # a count is not worth a failure
            if self._record is not None:
                self._record.count_read(source, size)

    def recorded(self, path: str) -> RecordedPath | None:
        """For reading a store path (in full); None when there is nothing to read."""
        found = self.find(path)
        return None if found is None else RecordedPath(path, found.listing, found.files.values())

    def _output(self, record: Record, pushes: list[PushedPath]) -> PushedOutput:
        latest = pushes[0]
        files = {file.name: file for file in record.files(latest.nar_hash)}
        listing = record.listing(latest.nar_hash)
        return PushedOutput(latest.path, latest.nar_hash, latest.nar_size, tuple(pushes), files, listing)


@contextmanager
def open_pushed(environ: Mapping[str, str]) -> Iterator[Pushed]:
    """What the user with this environment has pushed from here. Raises nothing: without a record there is no news."""
    record = None
    file = record_file(environ)
    with suppress(StoreError):
        record = None if file is None else Record.existing(file)
    try:
        yield Pushed(record)
    finally:
        if record is not None:
            record.close()


async def read_file(file: str, environ: Mapping[str, str], where: Where | None = None) -> bytes:
    """The contents of a file in a store path, from the nearest place that has it: what was pushed, the store here, and
    last the cache that `where` or the client configuration names. `file` as `cachesrv cat` takes it.

    Raises NotFound, BadInput, ConfigError, NotAllowed, ServerError, StoreError.
    """
    from cachesrv.push.contents import Where, open_contents  # noqa: PLC0415  brings HTTP with it

    parts: list[bytes] = []
    async with open_contents(file, where or Where(), environ) as (contents, names):
        await contents.copy(names, lambda data: parts.append(bytes(data)))
    return b"".join(parts)
