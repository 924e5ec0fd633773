"""What keeps a path, or where it has gone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.nix.store_path import HASH_PART_LENGTH
from cachesrv.services import amounts
from cachesrv.services.marking import Marking
from cachesrv.services.referrers import Referrers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.catalog.base import Catalog, PathRecord
    from cachesrv.catalog.retention import PathUse, PinRecord
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.marking import Policy
    from cachesrv.storage.base import ObjectInfo

    Head = Callable[[str], Awaitable[ObjectInfo | None]]

PUBLISHED, REMOVED, REFUSED, UNKNOWN = "published", "removed", "refused", "unknown"

_PINS = 5
_LEASES = 3
_LINKS = 8
"""Pins, leases and links of a chain that are spelt out, at most."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One of the things that there are to say: a line, and a word for what it is about."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """`state` is PUBLISHED, REMOVED, REFUSED or UNKNOWN; `kept`: whether the next collection keeps it."""

    state: str
    kept: bool
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class _Uses:
    """The one of a path and all that need it that was used last, and those of them that are leased."""

    own: PathUse
    latest: PathUse
    leased: list[int]


class Why:
    """Explains. `policy` is that of the cache, None when it keeps everything; removals are remembered for `history`
    seconds. `head` is asked whether storage has what the catalog does not know; it may raise StoreError.
    """

    def __init__(
        self, catalog: Catalog, head: Head, cache: ServedCache, policy: Policy | None, *, history: int
    ) -> None:
        self._catalog = catalog
        self._head = head
        self._cache = cache
        self._policy = policy
        self._history = history

    async def explain(self, hash_part: str) -> Explanation:
        """What there is to say of this path; takes some seconds for each million paths in the cache."""
        now = int(time.time())
        record = await self._catalog.path(self._cache.name, hash_part)
        number = (await self._catalog.numbers(self._cache.name, [hash_part])).get(hash_part)
        if record is None or number is None:
            return await self._absent(hash_part)
        referrers = await Referrers.of(self._catalog, [number])
        uses = await self._uses(number, referrers, now)
        if uses is None:
            return await self._absent(hash_part)
        keeping = [*await self._pins(referrers, now), *await self._leases(referrers, uses)]
        keeping += await self._rules(number, uses, now, certain=bool(keeping))
        reasons = [_published(record), *await self._needed(referrers, uses), *keeping]
        if not keeping:
            reasons.append(Reason("nothing", "nothing keeps it: the next collection takes it away"))
        return Explanation(PUBLISHED, bool(keeping), (*reasons, *await self._conflicts(hash_part)))

    async def _absent(self, hash_part: str) -> Explanation:
        reasons = []
        removal = await self._catalog.removal(self._cache.name, hash_part)
        if removal:
            path = f"{hash_part}-{removal.name}"
            when = f"was removed {amounts.date(removal.at)} by {removal.by}"
            reasons.append(Reason("removal", f"{path} {when}: {removal.reason}"))
            if await self._catalog.nars_by_hash(self._cache.prefix, [removal.nar_hash]):
                text = f"its NAR, {removal.nar_hash}, is still here: pushed again, it need not be sent"
                reasons.append(Reason("nar", text))
        refused = await self._refusals(hash_part)
        if not removal and not refused:
            return await self._unknown(hash_part)
        return Explanation(
            REMOVED if removal else REFUSED if refused else UNKNOWN, kept=False, reasons=(*reasons, *refused)
        )

    async def _unknown(self, hash_part: str) -> Explanation:
        """What there is to say of a path that the catalog has never had, or has lost."""
        try:
            stored = await self._head(self._cache.narinfo_key(hash_part))
        except StoreError as error:
            told = [Reason("storage", f"whether it lies in storage cannot be told: {error}")]
        else:
            if stored and self._cache.bucket_is_authority:
                text = f"{hash_part} lies in storage since {amounts.date(int(stored.modified))}, where others write to"
                kept = f"{self._cache.name}: it is theirs to collect"
                return Explanation(PUBLISHED, kept=True, reasons=(Reason("storage", f"{text} {kept}"),))
            text = (
                f"it lies in the storage of {self._cache.name}, and the catalog does not know it: unless a push of it"
            )
            told = [Reason("storage", f"{text} is at work, `cachesrv reindex` publishes it")] if stored else []
        text = f"{hash_part} was never pushed to {self._cache.name}, as far as that is remembered:"
        never = Reason("unknown", f"{text} [collect] history = {amounts.time(self._history)}")
        return Explanation(UNKNOWN, kept=False, reasons=(never, *told))

    async def _refusals(self, hash_part: str) -> list[Reason]:
        refused = await self._conflicts(hash_part)
        if refusal := await self._catalog.refusal(self._cache.name, hash_part):
            push = f"a push of {hash_part}-{refusal.name} by {refusal.pusher} was refused {amounts.date(refusal.at)}"
            refused.insert(0, Reason("refusal", f"{push}: {refusal.reason}"))
        return refused

    async def _conflicts(self, hash_part: str) -> list[Reason]:
        return [
            Reason(
                "conflict",
                f"another NAR for it, {conflict.refused_nar_hash}, was refused {amounts.date(conflict.at)} from"
                f" {conflict.pusher}; published, by {conflict.publisher or 'somebody'}, was"
                f" {conflict.published_nar_hash}",
            )
            for conflict in await self._catalog.conflicts(self._cache.name, hash_part)
        ]

    async def _uses(self, number: int, referrers: Referrers, now: int) -> _Uses | None:
        """None when the path has gone meanwhile."""
        own = latest = None
        leased: list[int] = []
        after = 0
        while page := await self._catalog.uses(self._cache.name, now, after):
            for use in page:
                if use.number in referrers:
                    own = use if use.number == number else own
                    latest = use if latest is None or use.used_at >= latest.used_at else latest
                    leased += [use.number] if use.leased else []
            after = page[-1].number
        return _Uses(own, latest, leased) if own and latest else None

    async def _pins(self, referrers: Referrers, now: int) -> list[Reason]:
        found: list[Reason] = []
        more = 0
        for pin in await self._catalog.pins(self._cache.name):
            if pin.expires_at is not None and pin.expires_at <= now:
                continue
            if root := await self._root(pin, referrers):
                if len(found) < _PINS:
                    until = "" if pin.expires_at is None else f" until {amounts.date(pin.expires_at)}"
                    chain = await self._chain(referrers, root)
                    found.append(Reason("pin", f"kept by the pin {pin.name}{until}: {chain}"))
                else:
                    more += 1
        return [*found, Reason("pin", f"and by {more} more pins")] if more else found

    async def _root(self, pin: PinRecord, referrers: Referrers) -> int | None:
        """The latest path of a pin that is among the referrers."""
        hash_parts = [generation.base_name[:HASH_PART_LENGTH] for generation in pin.generations]
        numbers = await self._catalog.numbers(self._cache.name, hash_parts)
        roots = (numbers[hash_part] for hash_part in hash_parts if hash_part in numbers)
        return next((root for root in roots if root in referrers), None)

    async def _leases(self, referrers: Referrers, uses: _Uses) -> list[Reason]:
        found = [
            Reason("lease", f"kept by a push that relies on it: {await self._chain(referrers, number)}")
            for number in uses.leased[:_LEASES]
        ]
        more = len(uses.leased) - len(found)
        if more:
            found.append(Reason("lease", f"and by leases of {amounts.count(more, 'other path')} that need it"))
        return found

    async def _needed(self, referrers: Referrers, uses: _Uses) -> list[Reason]:
        own = f"used last {amounts.date(uses.own.used_at)}"
        if not referrers.count:
            return [Reason("use", f"{own}; no other path refers to it")]
        text = f"{own}; needed by {amounts.count(referrers.count, 'path')}, {len(referrers.direct)} of them directly"
        if uses.latest.number == uses.own.number:
            return [Reason("use", f"{text}, and were not used later")]
        chain = await self._chain(referrers, uses.latest.number)
        return [
            Reason("use", text),
            Reason("use", f"the latest of these uses was {amounts.date(uses.latest.used_at)}: {chain}"),
        ]

    async def _rules(self, number: int, uses: _Uses, now: int, *, certain: bool) -> list[Reason]:
        """What of the cache's policy keeps it, if it is not `certain` anyhow."""
        policy, used = self._policy, uses.latest.used_at
        if policy is None:
            text = f"{self._cache.name} keeps all paths: it has no retention_age and no retention_size"
            return [Reason("policy", text)]
        if used > now - policy.spared:
            lease = amounts.time(policy.spared)
            return [Reason("policy", f"used within [collect] lease = {lease}: kept until {_end(used, policy.spared)}")]
        if policy.max_size is None:
            age = policy.max_age or 0
            kept = used >= now - age
            text = f"used within retention_age = {amounts.time(age)}: kept until {_end(used, age)}"
            return [Reason("policy", text)] if kept else []
        if certain or number in await Marking(self._catalog, self._cache.name).plan(policy, now):
            return []
        return [Reason("policy", f"there is room for it within retention_size = {amounts.size(policy.max_size)}")]

    async def _chain(self, referrers: Referrers, number: int) -> str:
        chain = await referrers.way(number)
        names = {path.number: path.name for path in await self._catalog.summaries(self._cache.name, chain)}
        links = [names.get(link, "…") for link in chain]
        if len(links) > _LINKS:
            half = _LINKS // 2
            links[half:-half] = [f"… {len(links) - 2 * half} more …"]
        return " -> ".join(links)


def _published(record: PathRecord) -> Reason:
    by = f" by {record.pusher}" if record.pusher else ""
    text = f"{record.hash_part}-{record.name} was published {amounts.date(record.registered_at)}{by}"
    return Reason("publication", f"{text}; its NAR takes {amounts.size(record.file_size)}")


def _end(at: int, seconds: int) -> str:
    return amounts.date(at + seconds)
