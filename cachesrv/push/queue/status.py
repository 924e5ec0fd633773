"""What a queue holds and who pushes it, for whoever asks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cachesrv.errors import StoreError
from cachesrv.push.queue.entries import TROUBLE, Entries
from cachesrv.push.queue.intake import BATCH, number_written, written
from cachesrv.push.queue.lock import holder
from cachesrv.push.queue.queue_file import FILE
from cachesrv.push.queue.runner import Trouble
from cachesrv.services import amounts

if TYPE_CHECKING:
    from collections.abc import Iterator


class FailedPath(msgspec.Struct, frozen=True):
    """It is tried again at `next_try`, seconds since 1970 as all times here."""

    path: str
    reason: str
    attempts: int
    queued: float
    next_try: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`process` pushes the queue, None if nobody does; `waiting`, `in_flight` and `failed` are numbers of paths,
    `oldest` is when the first of them was queued; `trouble` is why nothing can be pushed at present.
    """

    process: int | None = None
    waiting: int = 0
    in_flight: int = 0
    failed: int = 0
    oldest: float | None = None
    trouble: Trouble | None = None
    in_flight_paths: list[str] = []
    failed_paths: list[FailedPath] = []


def read_status(queue: str) -> Status:
    """Without making a queue where there is none, nor changing one. Raises StoreError."""
    try:
        process = holder(queue)
        # looked at before the database: what moves there meanwhile is found twice, not never
        more = max(0, number_written(queue) - BATCH)
        fresh = {(entry.path, entry.kind): entry for one in written(queue) for entry in one.entries()}.values()
        known = Path(queue, FILE).exists()
    except OSError as error:
        raise StoreError(f"the queue {queue} cannot be read: {error.strerror}") from error
    ages = [entry.queued for entry in fresh]
    if not known:
        return Status(process=process, waiting=len(fresh) + more, oldest=min(ages, default=None))
    entries = Entries.open(queue, read_only=True)
    try:
        counts = entries.counts()
        trouble = entries.fact(TROUBLE)
        claimed, failed = entries.those_claimed(), entries.those_failed()
        if process is None:  # one that was killed had them in flight
            failed += [entry for entry in claimed if entry.attempts]
            more += sum(not entry.attempts for entry in claimed)
            claimed = []
        return Status(
            process=process,
            waiting=counts.waiting + entries.unknown(fresh) + more,
            in_flight=len(claimed),
            failed=len(failed),
            oldest=min([*ages, *([counts.oldest] if counts.oldest else [])], default=None),
            trouble=msgspec.json.decode(trouble, type=Trouble) if trouble else None,
            in_flight_paths=[entry.path for entry in claimed],
            failed_paths=[
                FailedPath(entry.path, entry.reason or "", entry.attempts, entry.queued, entry.next_try)
                for entry in failed
            ],
        )
    finally:
        entries.close()


def status_lines(status: Status) -> Iterator[str]:
    """For people."""
    yield f"waiting    {status.waiting}"
    yield f"in flight  {status.in_flight}"
    yield f"failed     {status.failed}"
    if status.oldest is not None:
        yield f"oldest     {amounts.moment(status.oldest)}, {_age_text(time.time() - status.oldest)} ago"
    if status.process is None:
        yield "pushed by  nobody: start `cachesrv queue run`"
    else:
        yield f"pushed by  process {status.process}"
    if status.trouble is not None:
        yield (
            f"trouble    since {amounts.moment(status.trouble.since)}: {status.trouble.reason}; "
            f"next try at {amounts.moment(status.trouble.next_try)}"
        )
    for path in status.in_flight_paths:
        yield f"in flight: {path}"
    for failed in status.failed_paths:
        attempts = amounts.count(failed.attempts, "attempt")
        when = f"next at {amounts.moment(failed.next_try)}" if failed.next_try else "next at once"
        yield f"failed: {failed.path}  {attempts}, {when}: {failed.reason}"


def _age_text(seconds: float) -> str:
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return amounts.count(int(seconds // size), unit)
    return amounts.count(max(0, int(seconds)), "second")
