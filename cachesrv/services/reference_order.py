"""The order in which paths can be published: each after all that it refers to.

All that was found is gone over once, depth first, in steps; memory is needed for the longest chain of references only.
Where references have to be there, a path is left out when one of them cannot be served, or is not there; or when it
leads to itself over others, which no path does that Nix made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.services.findings import BAD, OK, get

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cachesrv.index.scratch import Changes, Scratch
    from cachesrv.services.findings import Finding, FoundPath

_HASH_PART = 32
_ROOTS = 1000


@dataclass(slots=True)
class _Visit:
    """A path whose references are being gone over."""

    hash_part: str
    path: FoundPath
    done: int = 0


@dataclass(slots=True)
class Step:
    """Paths in the order in which they can be published; those that cannot, and why; and references that nothing was
    found of: whether they are there after all has to be said by `learn` before the next step.
    """

    paths: list[tuple[str, FoundPath]]
    broken: list[tuple[str, str]]
    unknown: list[str]


class ReferenceOrder:
    """`strict`: references have to be there."""

    def __init__(self, scratch: Scratch, *, strict: bool) -> None:
        self._scratch = scratch
        self._strict = strict
        self._visits: list[_Visit] = []
        self._visiting: set[str] = set()
        self._roots: list[str] = []
        self._after = b""
        self._learnt: list[tuple[bytes, bytes]] = []
        self.done = False

    def step(self, limit: int) -> Step:
        """Go on until so many paths have been decided, or one came up that nothing is known of. Blocks. Raises
        StoreError.
        """
        step = Step([], [], [])
        with self._scratch.changing() as changes:
            changes.put_many("standing", self._learnt)
            self._learnt = []
            while len(step.paths) + len(step.broken) < limit and not step.unknown:
                if not self._visits and not self._begin(changes):
                    self.done = True
                    break
                self._go_on(changes, step)
        return step

    def learn(self, unknown: Collection[str], there: Collection[str]) -> None:
        """Of the paths that nothing was found of, these are there."""
        self._learnt = [(hash_part.encode(), OK if hash_part in there else BAD) for hash_part in unknown]

    def _begin(self, changes: Changes) -> bool:
        """Take up a path that has not been met; False when there are no more."""
        for hash_part in self._next_roots(changes):
            if changes.get("standing", hash_part.encode()):
                continue
            finding = get(changes, hash_part)
            if finding and finding.path:
                self._enter(hash_part, finding.path)
                return True
        return False

    def _next_roots(self, changes: Changes) -> Iterator[str]:
        while True:
            if not self._roots:
                keys = [key for key, _ in changes.scan("listed", self._after, _ROOTS)]
                if not keys:
                    return
                self._after = keys[-1]
                self._roots = [key.decode() for key in reversed(keys)]
            yield self._roots.pop()

    def _enter(self, hash_part: str, path: FoundPath) -> None:
        """Its references are gone over next."""
        self._visits.append(_Visit(hash_part, path))
        self._visiting.add(hash_part)

    def _go_on(self, changes: Changes, step: Step) -> None:
        """Go over the references of the path that was met last, as far as they are decided."""
        visit = self._visits[-1]
        references = visit.path.references
        while visit.done < len(references):
            hash_part = references[visit.done][:_HASH_PART]
            if hash_part != visit.hash_part:
                standing = changes.get("standing", hash_part.encode())
                if standing is None and self._descend(changes, step, visit):
                    return
                if self._strict and changes.get("standing", hash_part.encode()) != OK:
                    why = f"it refers to {references[visit.done]}, which is not there or cannot be served"
                    step.broken.append((visit.hash_part, why))
                    self._leave(changes, BAD)
                    return
            visit.done += 1
        step.paths.append((visit.hash_part, visit.path))
        self._leave(changes, OK)

    def _descend(self, changes: Changes, step: Step, visit: _Visit) -> bool:
        """Whether the next reference of a path has to be decided first; False when it is now."""
        hash_part = visit.path.references[visit.done][:_HASH_PART]
        if hash_part in self._visiting:
            return False
        finding = self._found(changes, hash_part)
        if finding is None and self._strict:
            step.unknown += self._unknown(changes, visit)
            return True
        if finding is None or finding.path is None:
            return False
        self._enter(hash_part, finding.path)
        return True

    @staticmethod
    def _found(changes: Changes, hash_part: str) -> Finding | None:
        """What was found of a path, if that says whether it is there. One whose narinfo is merely no good may be
        published.
        """
        finding = get(changes, hash_part) if changes.get("listed", hash_part.encode()) else None
        return finding if finding and (finding.path or finding.lost) else None

    def _unknown(self, changes: Changes, visit: _Visit) -> Iterator[str]:
        """All references that it has which nothing is known of: they can be asked for together."""
        for reference in visit.path.references[visit.done :]:
            hash_part = reference[:_HASH_PART]
            if not changes.get("standing", hash_part.encode()) and not self._found(changes, hash_part):
                yield hash_part

    def _leave(self, changes: Changes, standing: bytes) -> None:
        visit = self._visits.pop()
        self._visiting.discard(visit.hash_part)
        changes.put("standing", visit.hash_part.encode(), standing)
