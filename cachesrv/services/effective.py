"""The configuration as it takes effect, in the form in which it is written: TOML.

What `cachesrv.config.load` reads from it acts as the original does. It holds no secret: keys are named by their files,
tokens by their hashes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from cachesrv.services.data_directory import DataDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.config import Config

_MEANING = {
    "base_url": "the address it listens on",
    "tls_certificate": "plain HTTP",
    "tls_private_key": "plain HTTP",
    "path": "none, the objects lie in a bucket",
    "bucket": "none, the objects lie in a folder",
    "prefix": "none",
    "region": "that of the SDK's settings, else us-east-1",
    "endpoint": "AWS in that region",
    "signing_key_files": "keys/<name>.secret in the data directory, made at the first start",
}


def render(config: Config) -> str:
    """All sections with all keys; those without a value as comments that say what it means."""
    resolved = _resolved(config)
    lines = [f"# data directory: {_text(str(config.data_dir))}"]
    for section in (field.name for field in msgspec.structs.fields(config) if field.name != "data_dir"):
        value = getattr(resolved, section)
        if isinstance(value, tuple):
            lines += [line for table in value for line in ("", f"[[{section}]]", *_keys(table))]
        else:
            lines += ["", f"[{section}]", *_keys(value)]
    return "\n".join(lines) + "\n"


def _resolved(config: Config) -> Config:
    """With the places that follow from others."""
    data, replace = DataDirectory(config.data_dir), msgspec.structs.replace
    own_objects = str(data.objects) if config.storage.kind == "filesystem" else None
    return replace(
        config,
        storage=replace(config.storage, path=config.storage.path or own_objects),
        catalog=replace(config.catalog, url=config.catalog.url or f"sqlite:///{data.catalog}"),
        delivery=replace(config.delivery, disk_cache_path=config.delivery.disk_cache_path or str(data.nar_cache)),
        index=replace(config.index, path=config.index.path or str(data.index)),
        cache=tuple(replace(cache, prefix=cache.place) for cache in config.cache),
    )


def _keys(table: msgspec.Struct) -> Iterator[str]:
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        yield f"# {field.name}: {_MEANING[field.name]}" if value is None else f"{field.name} = {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else _text(str(value))


def _text(text: str) -> str:
    # JSON escapes all that TOML wants escaped, but for one character
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return quoted.encode("utf-8", "replace").decode()
