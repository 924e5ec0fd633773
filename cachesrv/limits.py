"""How many tasks the kernel lets a user and a service have: each thread is one, and each process."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_THREAD = "can't start new thread"
"""What CPython says; its exception has no type of its own."""
_MEMBERSHIP = Path("/proc/self/cgroup")
_HIERARCHIES = {"": "/sys/fs/cgroup", "pids": "/sys/fs/cgroup/pids"}
"""Where the controller of tasks is mounted, by what a line of /proc/self/cgroup calls it: of cgroups 2, and of 1."""


def no_thread(error: BaseException) -> str | None:
    """A line that names the limits, if it was one of them that let no thread begin."""
    if not isinstance(error, RuntimeError) or str(error) != _NO_THREAD:
        return None
    named = [*_of_user(), *_of_groups()]
    limits = "; ".join(named) or "none that can be seen from here"
    return f"no thread could be started: raise the limit of tasks, or have fewer run ({limits})"


def _of_user() -> Iterator[str]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit != resource.RLIM_INFINITY:
        yield f"ulimit -u, LimitNPROC: {limit} of this user"


def _of_groups() -> Iterator[str]:
    """Of the control group, and of those that it is in."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in _HIERARCHIES:
                for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
                    yield from _of_group(Path(_HIERARCHIES[controllers] + str(folder)), str(folder))


def _of_group(folder: Path, name: str) -> Iterator[str]:
    with suppress(OSError):
        limit = (folder / "pids.max").read_text(encoding="ascii").strip()
        if limit != "max":
            yield f"TasksMax, pids.max: {limit} in {name}"
