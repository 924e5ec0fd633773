"""`cachesrv serve`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import click

from cachesrv.cli.options import config_file, kept_in, log_level

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from cachesrv.config import Cache, Config
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.services.schedule import Chore
    from cachesrv.telemetry import Metrics
    from cachesrv.web.site import Rules
    from cachesrv.wiring import Declared


@click.command(
    epilog="""\b
Examples:
  cachesrv serve
  cachesrv serve --listen 0.0.0.0:5000 --data-dir /srv/cachesrv
  cachesrv serve --config /etc/cachesrv.toml

Without --config there is one public cache, `main`, at / and /main. The first start makes a signing key and a push
token in the data directory, and prints what clients need.
"""
)
@config_file
@kept_in
@click.option("--listen", multiple=True, metavar="ADDRESS", help="HOST:PORT or unix:PATH.  [default: 127.0.0.1:5000]")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that answer on the same port.  [default: 1]")
@log_level
def command(
    config_file: Path | None, data_dir: str | None, listen: tuple[str, ...], workers: int | None, log_level: str
) -> None:
    """Answer Nix clients over HTTP."""
    from cachesrv import config, telemetry, wiring

    telemetry.configure_logging(log_level)
    wiring.private_umask()
    _raise_limit_of_files()
    directory = config.data_dir(data_dir, os.environ)

    def load() -> config.Config:
        return config.load(config_file, directory, os.environ).changed(listen=listen or None, workers=workers)

    _serve(load, ("--data-dir", str(directory), *(("--config", str(config_file)) if config_file else ())))


def _raise_limit_of_files() -> None:
    """Each connection is an open file; the soft limit is made for programs that use select."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(load: Callable[[], Config], options: Sequence[str]) -> None:
    """`options` lead other commands to the same stores."""
    import asyncio
    import signal

    from cachesrv import systemd, wiring
    from cachesrv.cli.chores import chores
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.telemetry import Metrics
    from cachesrv.web.listen import open_sockets, url_of
    from cachesrv.web.server import tls_context
    from cachesrv.web.workers import Supervisor

    # A reload that is asked for during the start is done after it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    config = load()
    count = config.server.workers
    data = DataDirectory(config.data_dir)
    first_start = not os.access(data.push_token, os.F_OK)
    data.make()
    new = {cache.name for cache in config.cache if first_start or _lacks_key(data, cache)}
    tls = tls_context(config.server.tls_certificate, config.server.tls_private_key)
    inherited = systemd.inherited_sockets(os.environ)
    sockets = [inherited] * count if inherited else open_sockets(config.server.listen, count)
    urls = [url_of(sock, tls=tls is not None) for sock in sockets[0]]
    metrics = Metrics(count)
    # To open stores takes a little room; what is there is served also from a full disk.
    with wiring.open_disk_room(config).given_up_if_full():
        latest = _Latest(lambda: wiring.declared(load()))
        rules = asyncio.run(_check(config, latest.good, metrics, urls[0]))
    click.echo(_greeting(rules, urls, data.push_token, new=new))

    def work(number: int) -> None:
        metrics.become(number)
        own = list(chores(config, metrics, options)) if number == 0 else []
        asyncio.run(_work(config, latest, metrics, sockets[number], tls=tls, url=urls[0], chores=own))

    if count == 1:
        work(0)
    else:
        systemd.notify("READY=1", os.environ)
        Supervisor(count, work, latest.renew).run()


class _Latest:
    """What the configuration said when it was read last and was right.

    The first process keeps it too: a worker that has to be replaced is as all others are, whatever the file says by
    then, and wherever the files of keys are.
    """

    def __init__(self, read: Callable[[], Declared]) -> None:
        """Raises ConfigError when it is wrong now."""
        self.read = read
        self.good = read()

    def renew(self) -> bool:
        """Read it again; False if it is wrong, which is told, and changes nothing."""
        import structlog

        from cachesrv.errors import CachesrvError

        try:
            self.good = self.read()
        except CachesrvError as error:
            structlog.get_logger().error("the configuration stays as it was", error=str(error))
            return False
        except Exception:  # noqa: BLE001  a defect, whatever it is, must not end all workers
            structlog.get_logger().exception("defect: the configuration stays as it was")
            return False
        return True


async def _check(config: Config, given: Declared, metrics: Metrics, url: str) -> Rules:
    """Open everything once, so that what is wrong is found, and migrated, before anything is served."""
    from cachesrv import wiring

    async with wiring.open_services(config, metrics) as services:
        rules = wiring.build_rules(given, services.catalog, url)
        await services.completeness.tell(rules.caches.values())
        return rules


async def _work(
    config: Config,
    latest: _Latest,
    metrics: Metrics,
    sockets: list[socket.socket],
    *,
    tls: ssl.SSLContext | None,
    url: str,
    chores: list[Chore],
) -> None:
    from cachesrv import wiring
    from cachesrv.cli.heap import keep_all_there_is
    from cachesrv.services.schedule import scheduled
    from cachesrv.web.server import serve
    from cachesrv.web.site import Site

    async with wiring.open_services(config, metrics) as services:

        def rules() -> Rules:
            return wiring.build_rules(latest.read(), services.catalog, url)

        site = Site(services, wiring.build_rules(latest.good, services.catalog, url))
        for cache in site.rules.caches.values():
            await services.completeness.holds(cache)  # known before the first lookup
        keep_all_there_is()
        async with scheduled(services.catalog, chores), wiring.open_disk_room(config).kept():
            await serve(site, sockets, tls=tls, shutdown_timeout=config.server.shutdown_timeout, reload=rules)


def _lacks_key(data: DataDirectory, cache: Cache) -> bool:
    """Whether a key is made for it now, which no client knows."""
    return cache.signing_key_files is None and not os.access(data.secret_key(cache.name), os.F_OK)


def _greeting(rules: Rules, urls: list[str], token_file: Path, *, new: Collection[str]) -> str:
    """What the user has to copy of caches that are new; one line when none is."""
    parts = [f"cachesrv answers at {', '.join(urls)} for {', '.join(rules.caches)}"]
    caches = [cache for name, cache in rules.caches.items() if name in new]
    for cache in caches:
        url = f"{rules.base_url}/{cache.name}"
        keys = " ".join(key.public.render() for key in cache.signing_keys)
        parts.append(
            f"""
Clients of {cache.name} have in nix.conf:

    extra-substituters = {url}
    extra-trusted-public-keys = {keys}

Push to it, on this machine:

    cachesrv push --to {url} ./result

or from another one, with the token in {token_file}:

    cachesrv push --to {_from_afar(url)} --token-file FILE ./result"""
        )
    names = [key.name for cache in caches for key in cache.signing_keys if key.name == f"{cache.name}-1"]
    if names:
        parts.append(
            f"""
Nix trusts one key of each name. Where clients use another server with a key called {" or ".join(names)} as well, this
one needs a key of another name (`cachesrv key generate --help`)."""
        )
    return "\n".join(parts)


def _from_afar(url: str) -> str:
    """The same with a word for the name of this machine, where it stands for no more than that."""
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "::1", "localhost"}:
        return url
    return urlunsplit(parts._replace(netloc="HOST" if parts.port is None else f"HOST:{parts.port}"))
