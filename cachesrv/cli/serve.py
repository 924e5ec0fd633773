"""`cachesrv serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachesrv.config import Config
    from cachesrv.web.site import Rules


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
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML; see config.example.toml.")
@click.option("--data-dir", help="Where everything is kept.  [default: ~/.local/state/cachesrv]")
@click.option("--listen", multiple=True, metavar="ADDRESS", help="HOST:PORT or unix:PATH.  [default: 127.0.0.1:5000]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def command(config_file: Path | None, data_dir: str | None, listen: tuple[str, ...], log_level: str) -> None:
    """Answer Nix clients over HTTP."""
    import asyncio

    from cachesrv import config, telemetry, wiring

    telemetry.configure_logging(log_level)
    wiring.private_umask()
    directory = config.data_dir(data_dir, os.environ)

    def load() -> config.Config:
        loaded = config.load(config_file, directory, os.environ)
        return loaded.listening(listen) if listen else loaded

    asyncio.run(_serve(load))


async def _serve(load: Callable[[], Config]) -> None:
    from cachesrv import systemd, wiring
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.telemetry import Metrics
    from cachesrv.web.listen import open_sockets, url_of
    from cachesrv.web.server import serve, tls_context
    from cachesrv.web.site import Site

    config = load()
    data = DataDirectory(config.data_dir)
    first_start = not data.push_token.exists()
    data.make()
    tls = tls_context(config.server.tls_certificate, config.server.tls_private_key)
    sockets = systemd.inherited_sockets(os.environ) or open_sockets(config.server.listen)
    urls = [url_of(sock, tls=tls is not None) for sock in sockets]
    async with wiring.open_services(config, Metrics()) as services:

        def reload() -> Rules:
            return wiring.build_rules(load(), services.catalog, urls[0])

        site = Site(services, wiring.build_rules(config, services.catalog, urls[0]))
        click.echo(_greeting(site.rules, urls, data.push_token, first_start=first_start))
        await serve(site, sockets, tls=tls, shutdown_timeout=config.server.shutdown_timeout, reload=reload)


def _greeting(rules: Rules, urls: list[str], token_file: Path, *, first_start: bool) -> str:
    """What the user has to copy; all of it at the first start, one line later."""
    where = f"cachesrv answers at {', '.join(urls)} for {', '.join(rules.caches)}"
    if not first_start:
        return where
    parts = [where]
    for cache in rules.caches.values():
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

    cachesrv push --to {url} --token-file FILE ./result"""
        )
    return "\n".join(parts)
