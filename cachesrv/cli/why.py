"""`cachesrv why`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cachesrv.cli import FAILED, offline, path_name

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.catalog.base import Catalog
    from cachesrv.services.why import Explanation
    from cachesrv.storage.base import ObjectInfo


@click.command(
    epilog="""\b
Examples:
  cachesrv why ./result
  cachesrv why --cache team /nix/store/…-openssl-3.0.13

PATH is a store path, a link to one, a name inside one, or a hash part. Run it where the server runs.

\b
Exit status: 0 the path is in the cache, 1 it is not, 2 wrong usage or configuration.
"""
)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@offline.cache_option
@offline.server_options
def command(path: str, *, as_json: bool, cache: str | None, config_file: Path | None, data_dir: str | None) -> int:
    """Say what keeps a path in a cache, or where it has gone."""
    from cachesrv import wiring
    from cachesrv.services.why import PUBLISHED, Why

    config = offline.load(config_file, data_dir)
    chosen = offline.chosen_cache(config, cache)
    hash_part = path_name.hash_part_of(path, chosen.store_dir)

    async def head(key: str) -> ObjectInfo | None:
        storage = wiring.open_storage(config)
        try:
            return await storage.head(key)
        finally:
            await storage.close()

    async def explain(catalog: Catalog) -> Explanation:
        policy = wiring.policies(config).get(chosen.name)
        return await Why(catalog, head, chosen, policy, history=config.collect.history).explain(hash_part)

    explanation = offline.with_catalog(config, explain)
    if as_json:
        click.echo(json.dumps({"cache": chosen.name, "hash_part": hash_part, **asdict(explanation)}))
    else:
        for reason in explanation.reasons:
            click.echo(reason.text)
    return 0 if explanation.state == PUBLISHED else FAILED
