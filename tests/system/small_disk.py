"""A real disk that is soon full: a tmpfs of its own, in namespaces that need no privilege. See user_namespaces(7)."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.system.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class SmallDisk:
    """`inside` is where it is mounted for those who enter it, `outside` leads there for all others of the same user."""

    def __init__(self, inside: Path, holder: subprocess.Popen[bytes]) -> None:
        self.inside = inside
        self.outside = Path(f"/proc/{holder.pid}/root{inside}")
        self._holder = holder

    @property
    def entering(self) -> list[str]:
        """What goes before the words of a command that sees it."""
        return ["nsenter", "--target", str(self._holder.pid), "--user", "--mount", "--preserve-credentials", "--"]

    @property
    def free(self) -> int:
        room = os.statvfs(self.outside)
        return room.f_bavail * room.f_frsize

    def fill(self, *, leaving: int = 0) -> None:
        """As another program would that writes and writes."""
        with (self.outside / "filler").open("ab", buffering=0) as filler:
            while self.free > leaving:
                filler.write(bytes(4096))

    def empty(self) -> None:
        """Take that away again."""
        (self.outside / "filler").unlink()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
    """A disk of that size (as mount(8) takes it), at `folder`; fails where no namespace can be made."""
    folder.mkdir()
    script = 'mount -t tmpfs -o "size=$1" none "$2" && echo ready && exec sleep 86400'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", size, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline() == b"ready\n", "no disk could be mounted: see stderr"
            yield SmallDisk(folder, holder)
        finally:
            holder.kill()


class ServerOn(Server):
    """A server whose data directory lies on such a disk."""

    def __init__(self, disk: SmallDisk, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._disk = disk
        self.entering = disk.entering
        self.data_dir = disk.outside / "data"

    def command(self, name: str, *arguments: str) -> list[str]:
        return [*self.entering, *super().command(name, *arguments)]

    @property
    def told_data_dir(self) -> Path:
        return self._disk.inside / "data"

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command, on the same disk."""
        command: Sequence[str] = self.command(name, *arguments)
        return subprocess.run(command, check=False, env=self.environment, capture_output=True, text=True, timeout=120)
