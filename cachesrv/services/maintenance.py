"""The lock of whoever deletes: one process at a time, however many there are, on however many hosts.

It stands in the catalog, is prolonged while it is held, and runs out when its holder is heard of no more. On the same
host there is no need to wait for that: a holder that has died is found out, and one that is only slow keeps it.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import structlog

from cachesrv.catalog.retention import MAINTENANCE
from cachesrv.errors import StoreError, StoreUnavailable
from cachesrv.services.place import place

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.catalog.base import Catalog

_log = structlog.get_logger()

LIFETIME = 600
"""Seconds after which the lock of a process on another host is free that is heard of no more. No deletion that it began
may still be under way then.
"""
_PROLONG = 60
_LOOK_AGAIN = 0.5
_ENDED = frozenset("ZX")

_HOLDER = re.compile(r"process (?P<pid>\d+) on .+ \((?P<place>[^,]+), (?P<started>\d+), [0-9a-f]+\)")


class Busy(StoreUnavailable):
    """Another process is deleting at present."""


@asynccontextmanager
async def maintenance(catalog: Catalog, *, patience: float = 0, lock: str = MAINTENANCE) -> AsyncIterator[str]:
    """Hold the lock, or another one that only one process should have at a time; its holder's name. Waits for it for
    `patience` seconds; raises Busy.
    """
    holder = _name_of_ours()
    await _take(catalog, lock, holder, time.monotonic() + patience)
    prolonging = asyncio.create_task(_prolong(catalog, lock, holder))
    try:
        yield holder
    finally:
        prolonging.cancel()
        await asyncio.wait([prolonging])
        with suppress(StoreError):
            await catalog.unlock(lock, holder)


async def _take(catalog: Catalog, lock: str, holder: str, deadline: float) -> None:
    while True:
        now = int(time.time())
        # At the beginning of time no lock has run out: who lives here keeps it, also when the clock jumps.
        there = await catalog.lock(lock, holder, now=0, until=now + LIFETIME)
        if there != holder and (lives := _lives(there)) is not True:
            dead = there if lives is False else None
            there = await catalog.lock(lock, holder, now=now, until=now + LIFETIME, in_place_of=dead)
        if there == holder:
            return
        if time.monotonic() >= deadline:
            raise Busy(f"{there.partition(' (')[0]} is at it: collecting, deleting or repairing; try again later")
        await asyncio.sleep(_LOOK_AGAIN)


async def _prolong(catalog: Catalog, lock: str, holder: str) -> None:
    while True:
        await asyncio.sleep(_PROLONG)
        now = int(time.time())
        try:
            there = await catalog.lock(lock, holder, now=now, until=now + LIFETIME)
        except StoreError as error:
            _log.warning("the lock could not be prolonged", error=str(error))
        else:
            if there != holder:
                _log.error("the lock was lost", holder=there)
                return


def _name_of_ours() -> str:
    pid = os.getpid()
    return f"process {pid} on {socket.gethostname()} ({place()}, {_started(pid)}, {token_hex(4)})"


def _lives(holder: str) -> bool | None:
    """Whether that process, which began here, still runs; None when there is no telling."""
    match = _HOLDER.fullmatch(holder)
    if match is None or match["place"] != place():
        return None
    return _started(int(match["pid"])) == int(match["started"])


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None when it has ended. Source: proc(5), /proc/pid/stat."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in _ENDED else int(fields[19])
