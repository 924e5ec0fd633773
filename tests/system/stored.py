"""Where a server keeps its objects, looked at behind its back: a folder, or a bucket.

Names are those of the cache `main`, such as `nar/<file>`.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from cachesrv.storage.decorators import Direct
from cachesrv.storage.s3 import S3Store
from tests.radosgw import VIRTUAL_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from types_boto3_s3 import S3Client as Sdk

    from tests.radosgw import Gateway

CACHE = "main"


class Stored(Protocol):
    """See the module's docstring."""

    @property
    def settings(self) -> dict[str, str]:
        """The environment of a server that keeps its objects there."""

    def names(self, folder: str = "") -> set[str]:
        """All objects whose name begins so."""

    def read(self, name: str) -> bytes:
        """An object."""

    def fill(self, folder: Path) -> None:
        """Put there what lies in a folder, as another writer would."""

    def copy(self) -> Path:
        """A folder with all objects: a binary cache for `file://`."""

    def state(self) -> dict[str, object]:
        """All that is there, unfinished too, of all caches. It differs when anything was written, also the same."""


class Folder:
    """What lies below `root`, a folder with one in it for each cache."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def settings(self) -> dict[str, str]:
        """None: it is where a server that is told nothing keeps them."""
        return {}

    def names(self, folder: str = "") -> set[str]:
        """See Stored."""
        objects = self.root / CACHE
        files = (objects / folder).rglob("*")
        return {str(file.relative_to(objects)) for file in files if file.is_file() and not file.name.startswith(".")}

    def read(self, name: str) -> bytes:
        """See Stored."""
        return (self.root / CACHE / name).read_bytes()

    def fill(self, folder: Path) -> None:
        """See Stored."""
        shutil.copytree(folder, self.root / CACHE, dirs_exist_ok=True)

    def copy(self) -> Path:
        """See Stored."""
        return self.root / CACHE

    def state(self) -> dict[str, object]:
        """See Stored."""
        return {
            str(file.relative_to(self.root)): (sha256(file.read_bytes()).hexdigest(), file.stat().st_ino)
            for file in sorted(self.root.rglob("*"))
            if file.is_file()
        }


class Bucket:
    """What lies below a prefix of a bucket; without one, a bucket that is one cache and nothing else. Copies of it are
    made below `folder`. Servers talk to `endpoint`: the gateway itself, unless it is said, and by a name that is not
    theirs, as buckets have. NARs reach clients as `mode` says, or as they do by default.
    """

    def __init__(
        self, gateway: Gateway, bucket: str, prefix: str, folder: Path, *, mode: str = "", endpoint: str = ""
    ) -> None:
        self._settings = {"CACHESRV_STORAGE__PREFIX": prefix} if prefix else {"CACHESRV_CACHE__0__PREFIX": ""}
        self._below = f"{prefix}/" if prefix else ""
        self._cache = f"{prefix}/{CACHE}/" if prefix else ""
        self.name = bucket
        self.prefix = prefix
        self._gateway = gateway
        self._folder = folder
        self._mode = mode
        self._endpoint = endpoint or f"http://{VIRTUAL_DOMAIN}:{gateway.port}"

    @property
    def settings(self) -> dict[str, str]:
        """Without a disk cache: NARs come from the bucket, all of them."""
        return (
            self._gateway.environment()
            | {
                "CACHESRV_STORAGE__KIND": "s3",
                "CACHESRV_STORAGE__BUCKET": self.name,
                "CACHESRV_STORAGE__ENDPOINT": self._endpoint,
                "CACHESRV_DELIVERY__DISK_CACHE_SIZE": "0",
            }
            | self._settings
            | ({"CACHESRV_DELIVERY__MODE": self._mode} if self._mode else {})
        )

    def names(self, folder: str = "") -> set[str]:
        """See Stored."""
        return {key.removeprefix(self._cache) for key, _ in self._keys(self._cache + folder)}

    def read(self, name: str) -> bytes:
        """See Stored."""
        with closing(self._gateway.client()) as client:
            return self._read(client, self._cache + name)

    def write(self, name: str, data: bytes, encoding: str = "identity") -> None:
        """Put an object there, whatever lies there."""
        with closing(self._gateway.client()) as client:
            key = self._cache + name
            client.put_object(Bucket=self.name, Key=key, Body=data, ContentEncoding=encoding)

    def fill(self, folder: Path) -> None:
        """See Stored."""
        with closing(self._gateway.client()) as client:
            for file in folder.rglob("*"):
                if file.is_file():
                    key = f"{self._cache}{file.relative_to(folder)}"
                    client.put_object(Bucket=self.name, Key=key, Body=file.read_bytes())

    def copy(self) -> Path:
        """See Stored."""
        folder = self._folder / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        with closing(self._gateway.client()) as client:
            for key, _ in self._keys(self._cache):
                file = folder / key.removeprefix(self._cache)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self._read(client, key))
        return folder

    def state(self) -> dict[str, object]:
        """See Stored."""
        return {**dict(self._keys(self._below)), "uploads": self.uploads()}

    def open(self) -> S3Store:
        """A store that works on it."""
        return S3Store(
            self.name,
            requests=Direct(),
            prefix=self.prefix,
            endpoint=self._gateway.endpoint,
            session=self._gateway.session(),
        )

    def uploads(self) -> set[str]:
        """The multipart uploads that were not completed."""
        with closing(self._gateway.client()) as client:
            listed = client.list_multipart_uploads(Bucket=self.name, Prefix=self._below)
            return {upload["UploadId"] for upload in listed.get("Uploads", ())}

    def parts(self) -> set[int]:
        """Numbers of the parts of all these."""
        with closing(self._gateway.client()) as client:
            listed = client.list_multipart_uploads(Bucket=self.name, Prefix=self._below)
            answers = [
                client.list_parts(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
                for upload in listed.get("Uploads", ())
            ]
        return {part["PartNumber"] for answer in answers for part in answer.get("Parts", ())}

    def _keys(self, prefix: str) -> Iterator[tuple[str, object]]:
        """Keys, and what tells one writing of them from another."""
        with closing(self._gateway.client()) as client:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                for found in page.get("Contents", ()):
                    yield found["Key"], (found["ETag"], found["LastModified"])

    def _read(self, client: Sdk, key: str) -> bytes:
        return client.get_object(Bucket=self.name, Key=key)["Body"].read()
