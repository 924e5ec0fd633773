"""The server process: sockets in, signals handled, requests in flight finished at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from cachesrv import systemd
from cachesrv.errors import CachesrvError, ConfigError, StoreError
from cachesrv.services.finishing import keep_finishing
from cachesrv.services.relearning import keep_forgetting
from cachesrv.services.removing import Removing
from cachesrv.web.accepting import Accepting
from cachesrv.web.app import create_app
from cachesrv.web.fast import FastAnswers
from cachesrv.web.front import IDLE_SECONDS, Fronts, reporting
from cachesrv.web.listen import end_stalls
from cachesrv.web.reactor import Reactor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from cachesrv.index.base import Index
    from cachesrv.web.site import Rules, Services, Site

_log = structlog.get_logger()

_FOR_EVER = 10**8
"""Seconds. How long a connection may be idle is for the front to see to: it knows of the requests it answers itself."""

_ABANDONED = 24 * 3600
"""Seconds of silence after which what is being written belongs to a writer that was killed."""

_MAX_LINE = 8190


class _Defects(logging.Filter):
    """What clients send that is not HTTP is told to them, and is no defect that belongs into the log with its stack."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], BadHttpMessage))


def _log_of_aiohttp() -> logging.Logger:
    logger = logging.getLogger("cachesrv.http")
    logger.addFilter(_Defects())
    return logger


RUNNER_OPTIONS: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": _FOR_EVER,
    "max_line_size": _MAX_LINE,
    "max_field_size": _MAX_LINE,
    "logger": _log_of_aiohttp(),
    "shutdown_timeout": 1.0,  # for handlers that are being cancelled: those in time were waited for before
}
"""How aiohttp handles connections."""


def tls_context(certificate: str | None, private_key: str | None) -> ssl.SSLContext | None:
    """A server's TLS settings, None when there is no certificate. Raises ConfigError."""
    if certificate is None:
        return None
    for name, file in (("tls_certificate", certificate), ("tls_private_key", private_key)):
        try:
            Path(file or "").open("rb").close()
        except OSError as error:
            raise ConfigError(f"{name}: {file} cannot be read: {error.strerror}") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        why = getattr(error, "reason", None) or error
        raise ConfigError(f"{certificate} and {private_key} are no certificate and its key (PEM): {why}") from error
    return context


async def serve(
    site: Site,
    sockets: Sequence[socket.socket],
    *,
    tls: ssl.SSLContext | None,
    shutdown_timeout: float,
    reload: Callable[[], Rules],
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP, which may be blocked until now, puts in force what `reload` returns."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    looking: set[asyncio.Task[None]] = set()
    loop.add_signal_handler(signal.SIGHUP, _reload, site, reload, looking)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    async with listening(site, sockets, tls=tls, shutdown_timeout=shutdown_timeout):
        systemd.notify("READY=1", os.environ)
        watchdog = asyncio.create_task(systemd.feed_watchdog(os.environ))
        await stop.wait()
        site.ready = False
        systemd.notify("STOPPING=1", os.environ)
        _log.info("stopping", finishing_for_at_most=shutdown_timeout)
        watchdog.cancel()
        # A second signal means: now.
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGINT)


@asynccontextmanager
async def listening(
    site: Site,
    sockets: Sequence[socket.socket],
    *,
    tls: ssl.SSLContext | None,
    shutdown_timeout: float,
    idle_timeout: float = IDLE_SECONDS,
    by_reactor: bool = True,
) -> AsyncIterator[tuple[Fronts, Reactor]]:
    """Accept connections, those on plain TCP `by_reactor`; leaving stops that, and waits for requests in flight."""
    for sock in sockets:
        end_stalls(sock)
    runner = web.AppRunner(create_app(site, [reporting]), **RUNNER_OPTIONS)
    await runner.setup()
    assert runner.server is not None
    answers = FastAnswers(site)
    fronts = Fronts(answers, runner.server, idle_timeout=idle_timeout)
    direct = [sock for sock in sockets if by_reactor and tls is None and sock.family != socket.AF_UNIX]
    others = [sock for sock in sockets if sock not in direct]
    accepting = Accepting(fronts, tls)
    accepting.start(others)
    reactor = Reactor(answers, fronts, idle_timeout=idle_timeout)
    reactor.start(direct)
    fronts.start()
    works = (
        site.services.usage.run(),
        _sweep(site.services),
        _finish(site),
        keep_forgetting(site.services.index, lambda: site.rules.caches),
        _warm(site.services.index),
    )
    chores = [asyncio.create_task(work) for work in works]
    try:
        yield fronts, reactor
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.wait(chores)
        await accepting.stop()
        await reactor.stop_answering()
        await asyncio.gather(fronts.stop(shutdown_timeout), reactor.close(shutdown_timeout))
        answers.close()
        await runner.cleanup()
        fronts.abort()


async def _warm(index: Index) -> None:
    """Lookups in the first minutes need not wait for the disk."""
    steps = index.warm()
    while await asyncio.to_thread(next, steps, 0):
        pass


async def _sweep(services: Services) -> None:
    """Remove what killed writers and clients left behind: at the start, and from time to time."""
    while True:
        try:
            removed = await services.storage.sweep(older_than=_ABANDONED) + await services.uploads.sweep()
        except StoreError as error:
            _log.error("unfinished objects cannot be removed", error=str(error))
        else:
            if removed:
                _log.info("unfinished objects removed", number=removed)
        await asyncio.sleep(_ABANDONED)


async def _finish(site: Site) -> None:
    """Remove what others did not come to remove."""
    services = site.services
    removing = Removing(services.storage, services.catalog, services.index)
    await keep_finishing(removing, services.catalog, lambda: site.rules.caches)


def _reload(site: Site, reload: Callable[[], Rules], looking: set[asyncio.Task[None]]) -> None:
    """A configuration that is wrong changes nothing. In `looking` are tasks that go on."""
    systemd.notify("RELOADING=1", os.environ)
    try:
        site.rules = reload()
    except CachesrvError as error:
        _log.error("the configuration stays as it was", error=str(error))
    else:
        _log.info("configuration reloaded", caches=sorted(site.rules.caches))
        task = asyncio.get_running_loop().create_task(_find_out(site))
        looking.add(task)
        task.add_done_callback(looking.discard)
    finally:
        systemd.notify("READY=1", os.environ)


async def _find_out(site: Site) -> None:
    """Whether the catalog knows all of caches that are new: else storage is asked for whatever is not there."""
    try:
        await site.services.completeness.tell(site.rules.caches.values())
    except StoreError as error:
        _log.warning("it was not found out what lies in storage", error=str(error))
