"""Local stores to push from: made once below a folder, found again there. A chroot store each, with root and all.

`closure-…` has paths made of the files that this machine has, of very different sizes, with references; `large-…` has
one file of such bytes; `small-…` has many files of a kibibyte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.nix import base32
from cachesrv.nix.nar_writer import dump
from tests.system.nix import STORE_DIR, Nix

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB, GIB = 2**10, 2**20, 2**30
SOURCES = ("/usr/lib", "/usr/bin", "/usr/share", "/usr/include", "/usr/local")

_REFERENCES = 5
_COPIED_AT_ONCE = MIB


@dataclass(frozen=True)
class Store:
    """A machine with a store, and the paths in it that are to be pushed, with all that they need: `number` in all."""

    nix: Nix
    paths: list[str]
    number: int


def closure(folder: Path, number: int, size: int) -> Store:
    """One path that needs `number - 1` others, `size` bytes in all."""
    return _store(folder / f"closure-{number}-{size}", lambda making: making.closure(number, size))


def large(folder: Path, size: int) -> Store:
    """One path that is a file."""
    return _store(folder / f"large-{size}", lambda making: making.large(size))


def small(folder: Path, number: int) -> Store:
    """So many paths of 1 KiB, which refer to some of those before them."""
    return _store(folder / f"small-{number}", lambda making: making.small(number))


def _store(folder: Path, make) -> Store:  # noqa: ANN001  a method of what is defined below
    done = folder / "done.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        making = _Making(Nix(folder))
        done.write_text(json.dumps({"paths": make(making), "number": len(making.registered)}))
    found = json.loads(done.read_text())
    return Store(Nix(folder), found["paths"], found["number"])


class _Making:
    def __init__(self, nix: Nix) -> None:
        self.nix = nix
        self.registered: list[str] = []
        nix.root.mkdir(parents=True)
        self._known: list[str] = []
        self._referred: set[str] = set()

    def closure(self, number: int, size: int) -> list[str]:
        """Files by turns into one path after the other; how much each takes is as uneven as in real closures."""
        picked = random.Random(0)
        shares = [picked.lognormvariate(0, 2) for _ in range(number - 1)]
        files = _files_of_this_machine()
        for place, share in enumerate(shares):
            folder = self._folder(f"package-{place}")
            folder.mkdir()
            left = size * share / sum(shares)
            while left > 0:
                file = next(files)
                left -= _copy(file, folder / f"{len(list(folder.iterdir()))}-{file.name}", round(left))
            self._register(folder, self._some(picked))
        last = self._folder("system")
        last.write_text("the one that needs all others\n")
        unreferred = sorted(set(self.registered) - self._referred)
        self._register(last, unreferred)
        return self._load()[-1:]

    def large(self, size: int) -> list[str]:
        file = self._folder("large")
        files = _files_of_this_machine()
        with file.open("wb") as stream:
            while (left := size - stream.tell()) > 0:
                stream.writelines(_pieces(next(files), left))
        self._register(file, [])
        return self._load()

    def small(self, number: int) -> list[str]:
        picked = random.Random(0)
        for place in range(number):
            file = self._folder(f"small-{place}")
            file.write_bytes(picked.randbytes(KIB // 4) + b"a line that compresses\n" * 34)
            self._register(file, self._some(picked))
        return self._load()

    def _folder(self, name: str) -> Path:
        return self.nix.root / f"{base32.encode(sha256(name.encode()).digest()[:20])}-{name}"

    def _some(self, picked: random.Random) -> list[str]:
        """References to paths before, most of them to the nearest."""
        count = min(len(self.registered), picked.randrange(_REFERENCES))
        return sorted(
            {self.registered[-1 - int(picked.expovariate(0.05)) % len(self.registered)] for _ in range(count)}
        )

    def _register(self, file: Path, references: list[str]) -> None:
        digest, size = sha256(), 0
        for piece in dump(file):
            digest.update(piece)
            size += len(piece)
        path = f"{STORE_DIR}/{file.name}"
        fields = [path, digest.hexdigest(), size, "", len(references), *references]
        self._known.append("".join(f"{field}\n" for field in fields))
        self._referred.update(references)
        self.registered.append(path)

    def _load(self) -> list[str]:
        self.nix.run("nix-store", "--load-db", text="".join(self._known))
        return self.registered


def _files_of_this_machine() -> Iterator[Path]:
    """Over and over."""
    while True:
        for source in SOURCES:
            for folder, _, names in sorted(os.walk(source)):
                for name in sorted(names):
                    file = Path(folder, name)
                    if file.is_file() and not file.is_symlink():
                        yield file


def _copy(source: Path, target: Path, most: int) -> int:
    """How many bytes there were, `most` at most."""
    with target.open("wb") as stream:
        stream.writelines(_pieces(source, most))
        size = stream.tell()
    target.chmod(0o555 if os.access(source, os.X_OK) else 0o444)
    return max(1, size)


def _pieces(source: Path, most: int) -> Iterator[bytes]:
    with source.open("rb") as stream:
        while most > 0 and (piece := stream.read(min(most, _COPIED_AT_ONCE))):
            most -= len(piece)
            yield piece
