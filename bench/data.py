"""Caches to measure with: made once below a folder, found again there.

`paths-<N>/` is the data directory of a cachesrv with N signed paths in its cache `main`: their narinfos as files, in
the index and in the catalog, as N pushes would have left them. `nars/` is one with NARs of several sizes.
What is asked for stands in files of keys, one behind the other, all of the same length: a load generator maps them
into memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from sqlalchemy.schema import CreateTable

from cachesrv.catalog import schema
from cachesrv.catalog.base import PathRecord
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.index.base import IndexEntry
from cachesrv.index.lmdb import LmdbIndex
from cachesrv.nix import base32, narinfo
from cachesrv.nix.hashes import Hash
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.store_path import DEFAULT_STORE_DIR, StorePath
from cachesrv.services.answer import present
from cachesrv.services.data_directory import DataDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cachesrv.nix.signing import SecretKey

CACHE = "main"
KEY_SIZE = 32
ABSENT = 10_000
"""Hash parts that are asked for and not there, in the main question about misses."""

KIB, MIB = 2**10, 2**20
NAR_SETS = {KIB: 1000, 64 * KIB: 500, MIB: 64, 256 * MIB: 2}
"""Sizes of NARs, and how many there are of each."""

_TOGETHER = 5000
_FOLDER_MAP_SIZE = 64 * 2**30


@dataclass(frozen=True)
class Data:
    """A data directory: `objects` is what a file server serves; `present` and `absent` are files of keys."""

    folder: Path
    number: int

    @property
    def objects(self) -> Path:
        return self.folder / "objects"

    @property
    def present(self) -> Path:
        return self.folder / "present.keys"

    @property
    def absent(self) -> Path:
        return self.folder / "absent.keys"

    def keys(self, file: Path, number: int) -> list[str]:
        """So many keys, spread over a file of them."""
        with file.open("rb") as stream:
            total = file.stat().st_size // KEY_SIZE
            found = []
            for place in range(0, total, max(1, total // number)):
                stream.seek(place * KEY_SIZE)
                found.append(stream.read(KEY_SIZE).decode())
        return found[:number]


def hash_part(kind: str, number: int) -> str:
    return base32.encode(sha256(f"{kind} {number}".encode()).digest()[:20])


def paths(folder: Path, number: int, *, files: bool = True) -> Data:
    """The cache with so many paths, made when it is not there. Without `files` no file server can have it."""
    data = Data(folder / f"paths-{number}", number)
    done = data.folder / "done.json"
    found = json.loads(done.read_text()) if done.exists() else {}
    if found.get("form") != _form() or (files and not found["files"]):
        shutil.rmtree(data.folder, ignore_errors=True)
        asyncio.run(_make_paths(data, files=files))
        done.write_text(json.dumps({"form": _form(), "files": files}))
    return data


def _form() -> str:
    """Differs when the catalog, or the answers in the index, have another form than before."""
    tables = [str(CreateTable(table)) for table in schema.metadata.sorted_tables]
    return sha256(repr([tables, present(b"a narinfo")]).encode()).hexdigest()


async def _make_paths(data: Data, *, files: bool) -> None:
    directory = DataDirectory(data.folder)
    directory.make()
    directory.token()
    key = directory.signing_key(CACHE)
    narinfos = directory.objects / CACHE
    narinfos.mkdir(parents=True)
    parts = sorted(hash_part("path", number) for number in range(data.number))
    data.present.write_text("".join(parts))
    data.absent.write_text("".join(hash_part("absent", number) for number in range(ABSENT)))
    index = LmdbIndex(str(directory.index))
    catalog = await SqlCatalog.open(f"sqlite:///{directory.catalog}")
    begun = time.monotonic()
    for start in range(0, len(parts), _TOGETHER):
        infos = [narinfo_at(parts, place, key) for place in range(start, min(start + _TOGETHER, len(parts)))]
        texts = [narinfo.render(info) for info in infos]
        if files:
            for info, text in zip(infos, texts, strict=True):
                (narinfos / f"{info.store_path.hash_part}.narinfo").write_bytes(text)
        index.put(
            IndexEntry(CACHE, info.store_path.hash_part, present(text)) for info, text in zip(infos, texts, strict=True)
        )
        await catalog.publish([_record(info, text) for info, text in zip(infos, texts, strict=True)])
        print(f"\r{start + len(infos)} paths in {time.monotonic() - begun:.0f} s", end="", flush=True)
    print()
    await catalog.close()
    index.close()
    os.sync()


def narinfo_at(parts: list[str], place: int, key: SecretKey) -> NarInfo:
    """Of the size and form of those of nixpkgs; it refers to paths before it."""
    picked = random.Random(place)
    nar_hash = Hash("sha256", picked.randbytes(32))
    references = sorted({parts[picked.randrange(place)] for _ in range(picked.randrange(8))} if place else ())
    info = NarInfo(
        store_path=_store_path(parts[place]),
        store_dir=DEFAULT_STORE_DIR,
        url=f"nar/{nar_hash.bare_nix32}.nar.zst",
        compression="zstd",
        file_hash=Hash("sha256", picked.randbytes(32)),
        file_size=picked.randrange(1000, 10_000_000),
        nar_hash=nar_hash,
        nar_size=picked.randrange(10_000, 50_000_000),
        references=tuple(map(_store_path, references)),
        deriver=StorePath(hash_part("deriver", place), f"package-{place}-1.0.drv"),
    )
    return info.add_signatures([key.sign(info.fingerprint)])


def _store_path(part: str) -> StorePath:
    return StorePath(part, f"package-{part[:6]}-1.0")


def _record(info: NarInfo, text: bytes) -> PathRecord:
    return PathRecord(
        cache=CACHE,
        hash_part=info.store_path.hash_part,
        name=info.store_path.name,
        narinfo=text,
        nar_key=f"{CACHE}/{info.url}",
        nar_hash=info.nar_hash.nix32,
        nar_size=info.nar_size,
        file_size=info.file_size or 0,
        references=tuple(map(str, info.references)),
        deriver=str(info.deriver),
        ca=None,
        registered_at=1_700_000_000,
    )


def nars(folder: Path) -> Data:
    """The cache with NARs of all sizes."""
    data = Data(folder / "nars", 0)
    if not (data.folder / "done.json").exists():
        shutil.rmtree(data.folder, ignore_errors=True)
        DataDirectory(data.folder).make()
        (data.objects / CACHE / "nar").mkdir(parents=True)
        for size, number in NAR_SETS.items():
            keys = [hash_part(f"nar {size}", place) for place in range(number)]
            for place, key in enumerate(keys):
                _write_nar(data.objects / CACHE / "nar" / f"{key}.nar", place, size)
            nar_keys(data, size).write_text("".join(keys))
        (data.folder / "done.json").write_text("{}")
    return data


def nar_keys(data: Data, size: int) -> Path:
    """The file of keys of the NARs of one size."""
    return data.folder / f"nars-{size}.keys"


def _write_nar(path: Path, seed: int, size: int) -> None:
    """Bytes that nothing can make smaller."""
    with path.open("wb") as stream:
        for piece in _pieces(seed, size):
            stream.write(piece)


def _pieces(seed: int, size: int) -> Iterator[bytes]:
    picked = random.Random(seed)
    block = picked.randbytes(min(size, MIB))
    for number in range(0, size, len(block)):
        yield sha256(f"{seed} {number}".encode()).digest()[: len(block)] + block[32:]


def unknown(folder: Path) -> Path:
    """A file of characters of hash parts, from any place of which one can be read that nobody has asked for."""
    path = folder / "unknown.keys"
    path.write_text("".join(random.choices(base32.ALPHABET, k=4 * MIB)))
    return path
