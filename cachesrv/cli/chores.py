"""What `cachesrv serve` has other commands do from time to time: in processes of their own, so that no answer waits."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from cachesrv.services.collect import COLLECTED
from cachesrv.services.schedule import Chore
from cachesrv.services.verify import VERIFIED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cachesrv.config import Config
    from cachesrv.telemetry import Metrics

_log = structlog.get_logger()

_STOPPING = 5.0
"""Seconds that a command has to end when it is told to."""
_TOLD_TO_END = {-signal.SIGTERM, -signal.SIGINT, 130}


def chores(config: Config, metrics: Metrics, options: Sequence[str]) -> Iterator[Chore]:
    """As configured; `options` are those by which a command finds the same configuration."""
    if config.collect.interval:
        yield Chore(COLLECTED, config.collect.interval, partial(_collect, metrics, options))
    if config.verify.interval:
        yield Chore(VERIFIED, config.verify.interval, partial(_verify, metrics, options))


async def _verify(metrics: Metrics, options: Sequence[str]) -> None:
    try:
        sums = await _run("verify", "--scheduled", *options)
    except _Failed as error:
        _log.error("the verification failed", error=str(error))
        metrics.add("verifications_failed")
        return
    if sums is None:
        return
    found = {key: sums[key] for key in ("paths", "nars", "bytes", "seconds", "young")}
    if sums["flaws"]:
        _log.error("the verification found flaws: `cachesrv verify` names them", flaws=sums["flaws"], **found)
    else:
        _log.info("the verification found no flaw", **found)
    metrics.add("verifications")


async def _collect(metrics: Metrics, options: Sequence[str]) -> None:
    try:
        sums = await _run("gc", "--scheduled", *options)
    except _Failed as error:
        _log.error("the garbage collection failed", error=str(error))
        metrics.add("collections_failed")
        return
    if sums is None:
        return
    _log.info("garbage collected", paths=sums["paths"], nars=sums["nars"], bytes=sums["nar_bytes"])
    metrics.add("collections")
    metrics.add("paths_collected", sums["paths"])
    metrics.add("nars_collected", sums["nars"])
    metrics.add("collected_bytes", sums["nar_bytes"])


class _Failed(Exception):
    """A command failed, and has said why in the log if it could."""


async def _run(*arguments: str) -> dict[str, Any] | None:
    """Run a command; the JSON that it prints, None when it had nothing to do or was told to end. Raises _Failed."""
    command = (sys.executable, "-m", "cachesrv", *arguments)
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE)
    except OSError as error:
        raise _Failed(str(error)) from error
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        await _end(process)
        raise
    assert process.returncode is not None
    if process.returncode in _TOLD_TO_END:
        return None
    if process.returncode:
        raise _Failed(f"it ended with {process.returncode}")
    found: dict[str, Any] | None = msgspec.json.decode(output) if output else None
    return found


async def _end(process: asyncio.subprocess.Process) -> None:
    """It gives back what it holds, if it can."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(_STOPPING):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):  # it has ended just now
            process.kill()
        await process.wait()
