"""What to do with each path of a push, decided from data alone: path infos, the server's answers, what upstreams have.

    upload      its NAR is sent, then it is published
    publish     its NAR is there, or comes with that of another path: nothing is sent
    present     it is in the cache
    upstream    a cache that all clients of this one use as well has it
    conflict    it is in the cache with another NAR

What upstreams have is found out before (see `upstreams`). When the server misses a reference that was left out for
this reason, `plan_refused` makes up for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from cachesrv.api import WantedPath
from cachesrv.errors import ServerError
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.push.one_line import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from cachesrv.api import MissingAnswer
    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.store_path import StorePath


class Decision(StrEnum):
    """See the module."""

    UPLOAD = "upload"
    PUBLISH = "publish"
    PRESENT = "present"
    UPSTREAM = "upstream"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Step:
    """A path, what happens to it, and why in words."""

    info: PathInfo
    decision: Decision
    reason: str

    @property
    def path(self) -> StorePath:
        return self.info.store_path


@dataclass(frozen=True, slots=True)
class Nar:
    """A NAR to be sent, once, and the paths that have it; `size` in bytes, 0 where the store never noted it."""

    hash: Hash
    size: int
    infos: tuple[PathInfo, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps with references first; NARs in the order of the first path that needs each."""

    steps: tuple[Step, ...]
    nars: tuple[Nar, ...]

    def count(self, decision: Decision) -> int:
        """How many paths go that way."""
        return sum(step.decision == decision for step in self.steps)

    @property
    def nar_bytes(self) -> int:
        """What there is to dump and to compress."""
        return sum(nar.size for nar in self.nars)

    def those(self, *decisions: Decision) -> Iterator[PathInfo]:
        """The paths that go one of these ways, references first."""
        return (step.info for step in self.steps if step.decision in decisions)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server said of the paths, batches put together; base names."""

    missing: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    conflicts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def merge(cls, answers: Iterable[MissingAnswer]) -> Answers:
        """One out of those to several batches."""
        missing: set[str] = set()
        stored: set[str] = set()
        conflicts: dict[str, str] = {}
        for answer in answers:
            missing.update(answer.missing)
            stored.update(answer.stored)
            conflicts.update({one.path: one.published_nar_hash for one in answer.conflicts})
        return cls(frozenset(missing), frozenset(stored), conflicts)

    def after(self, *, stored: Iterable[StorePath], published: Iterable[StorePath]) -> Answers:
        """What the server would say when these NARs have been sent and these paths been published meanwhile."""
        missing = self.missing.difference(path.base_name for path in published)
        return Answers(missing, missing & self.stored.union(path.base_name for path in stored), self.conflicts)

    def about(self, names: AbstractSet[str]) -> Answers:
        """The part that concerns these paths."""
        conflicts = {name: found for name, found in self.conflicts.items() if name in names}
        return Answers(self.missing & names, self.stored & names, conflicts)

    def check(self, asked: Iterable[str]) -> None:
        """Raises ServerError when they are not answers to a question about these paths."""
        if (self.missing | self.stored | self.conflicts.keys()) - set(asked):
            raise ServerError("the server answered about paths that it was not asked about")
        if self.stored - self.missing or self.missing & self.conflicts.keys():
            raise ServerError("the server's answer about missing paths contradicts itself")


def wanted(info: PathInfo) -> WantedPath:
    """The question whether a path is there."""
    return WantedPath(info.store_path.base_name, info.nar_hash.nix32, info.nar_size)


def make_plan(infos: Iterable[PathInfo], answers: Answers, left_out: Mapping[StorePath, str] | None = None) -> Plan:
    """Decide on every path; `left_out` are those that upstreams have, and why. Raises ServerError for answers to
    another question, BadInput for a cycle of references.
    """
    ordered = in_reference_order(infos)
    answers.check(info.store_path.base_name for info in ordered)
    sent: dict[Hash, list[PathInfo]] = {}
    steps = tuple(_decide(info, answers, sent, left_out or {}) for info in ordered)
    return Plan(steps, tuple(Nar(nar_hash, _size(nar_infos), tuple(nar_infos)) for nar_hash, nar_infos in sent.items()))


def plan_refused(plan: Plan, refused: Iterable[StorePath], answers: Answers) -> Plan | None:
    """What to do about paths that the server refused for want of references: send what they need, directly or not,
    that `plan` had left to upstreams. `answers` are as of now. None when there is nothing of that kind.
    """
    by_path = {step.path: step for step in plan.steps}
    needed: dict[str, PathInfo] = {}
    pending = [path for path in refused if path in by_path]
    while pending:
        info = by_path[pending.pop()].info
        if info.store_path.base_name not in needed:
            needed[info.store_path.base_name] = info
            pending += [path for path in info.references if path in by_path]
    if not any(by_path[info.store_path].decision is Decision.UPSTREAM for info in needed.values()):
        return None
    return make_plan(needed.values(), answers.about(needed.keys()))


def _decide(
    info: PathInfo, answers: Answers, sent: dict[Hash, list[PathInfo]], left_out: Mapping[StorePath, str]
) -> Step:
    """`sent` gathers the NARs that have to be sent, and the paths that each is for."""
    name = info.store_path.base_name
    if name in answers.conflicts:
        return Step(info, Decision.CONFLICT, _conflict(answers.conflicts[name], info))
    if name not in answers.missing:
        return Step(info, Decision.PRESENT, "in the cache")
    if info.store_path in left_out:
        return Step(info, Decision.UPSTREAM, left_out[info.store_path])
    if name in answers.stored:
        return Step(info, Decision.PUBLISH, "its NAR is in the cache")
    others = sent.setdefault(info.nar_hash, [])
    others.append(info)
    if len(others) > 1:
        return Step(info, Decision.PUBLISH, f"its NAR is that of {others[0].store_path}")
    return Step(info, Decision.UPLOAD, "not in the cache")


def _conflict(published: str, info: PathInfo) -> str:
    return (
        f"the cache has it with NAR hash {one_line(published)}, this store with {info.nar_hash.nix32}: "
        "the build is not deterministic, and what is published stays"
    )


def _size(infos: Sequence[PathInfo]) -> int:
    return max(info.nar_size for info in infos)
