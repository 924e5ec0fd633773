"""Finds what is meant by a name inside a store path, in its listing; with words for what is not there."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.listing import Directory, Regular, Symlink
from cachesrv.push.one_line import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachesrv.nix.listing import ListingNode

MAX_LINKS = 40

Names = tuple[str, ...]
"""From the store path inwards; empty for the store path itself."""


def split(member: str) -> Names:
    """`bin/hello`, also with slashes too many."""
    return tuple(name for name in member.split("/") if name not in {"", "."})


def find(root: ListingNode, names: Sequence[str], path: str, *, follow: bool) -> tuple[Names, ListingNode]:
    """The node that is meant, and its own names. Links on the way are followed inside the store path, a link at the end
    only if `follow`.

    `path` is the full store path. Raises NotFound, which names the nearest parent that is there, or where a link leads
    that goes elsewhere.
    """
    here: list[tuple[str, ListingNode]] = [("", root)]
    pending = deque(names)
    links = 0
    while pending or (follow and isinstance(here[-1][1], Symlink)):
        _, node = here[-1]
        if isinstance(node, Symlink):
            links += 1
            if links > MAX_LINKS:
                raise NotFound(f"{_full(path, names)} leads through more than {MAX_LINKS} links")
            pending.extendleft(reversed(_target(node, _names(here), path)))
            here = here[:1] if node.target.startswith("/") else here[:-1]
        elif pending[0] == "..":
            here.pop()
            pending.popleft()
        else:
            here.append((pending[0], _child(node, pending[0], _full(path, _names(here)))))
            pending.popleft()
        if not here:
            raise NotFound(f"{_full(path, names)} leads out of {path}")
    return _names(here), here[-1][1]


def find_file(root: ListingNode, names: Sequence[str], path: str) -> tuple[Names, Regular]:
    """The file that is meant, all links followed, and its own names. Raises NotFound as `find` does; BadInput for a
    directory.
    """
    found, node = find(root, names, path, follow=True)
    if not isinstance(node, Regular):
        raise BadInput(f"{_full(path, found)} is a directory: `cachesrv ls` shows what is in it")
    return found, node


def _child(node: ListingNode, name: str, full: str) -> ListingNode:
    if not isinstance(node, Directory):
        raise NotFound(f"{full} is a file, there is no {one_line(name)} in it")
    child = node.entries.get(name)
    if child is None:
        raise NotFound(f"there is no {one_line(name)} in {full}")
    return child


def _target(link: Symlink, names: Names, path: str) -> Names:
    """Where a link leads: from its own directory, or from the store path itself where the target is absolute."""
    if not link.target.startswith("/"):
        return split(link.target)
    if link.target == path or link.target.startswith(f"{path}/"):
        return split(link.target[len(path) :])
    raise NotFound(f"{_full(path, names)} is a link to {one_line(link.target)}: ask for that")


def _names(here: Sequence[tuple[str, ListingNode]]) -> Names:
    return tuple(name for name, _ in here[1:])


def _full(path: str, names: Sequence[str]) -> str:
    return one_line("/".join([path, *names]))
