"""What a person wants to see: a file or folder in a store path, and where that is looked for.

http://host:5000/main/<hash part>-<name>/bin/x    in that cache
http://host:5000/main/<hash part>.narinfo         the same, as the cache names it
/nix/store/<hash part>-<name>/bin/x               in the store here, else in the cache that is configured
./result/bin/x                                    the same, by a link
<hash part>-<name>/bin/x                          the same, in short
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from cachesrv.errors import BadInput, ConfigError
from cachesrv.nix.store_path import HASH_PART_LENGTH, StorePath, is_hash_part
from cachesrv.push.address import Address, split_url
from cachesrv.push.members import Names, split

if TYPE_CHECKING:
    from cachesrv.push.store_location import StoreLocation

_OBJECTS = (".narinfo", ".ls")


@dataclass(frozen=True, slots=True)
class Wanted:
    """`name` is None where only the hash part was given; `cache` is None for a name in the local store."""

    hash_part: str
    name: str | None
    names: Names
    cache: Address | None = None


def parse(text: str, location: StoreLocation) -> Wanted:
    """Read one of the forms above. Raises ConfigError or BadInput for anything else, NotFound for a file that is not
    there.
    """
    if "://" in text:
        return _from_url(text)
    short = _store_path(text.partition("/")[0])
    if short is not None and not os.path.lexists(text.partition("/")[0]):
        return Wanted(short.hash_part, short.name, split(text.partition("/")[2]))
    path = location.resolve(text)
    return Wanted(path.hash_part, path.name, _names_behind(text, path, location))


def parse_cache(url: str) -> Address:
    """Any binary cache, for reading; unlike a cache of ours it need not have a name. Raises ConfigError."""
    parts = split_url(url)
    address = Address.parse(f"{parts.scheme}://{parts.netloc}")
    if parts.query or parts.fragment:
        raise ConfigError(f"not the URL of a cache, it has more than host and path: {url}")
    prefix, _, name = parts.path.rstrip("/").rpartition("/")
    return Address(address.base + prefix, name)


def _from_url(url: str) -> Wanted:
    segments = url.split("/")
    for number, segment in enumerate(segments[3:], 3):
        found = _in_url(unquote(segment))
        if found is not None:
            cache = "/".join(segments[:number]).removesuffix("/nix/store")
            names = split(unquote("/".join(segments[number + 1 :])))
            return Wanted(*found, names, parse_cache(cache))
    parse_cache(url)  # says what else is wrong
    raise ConfigError(f"{url} names no store path: expected <cache>/<hash part>-<name> or <cache>/<hash part>.narinfo")


def _in_url(segment: str) -> tuple[str, str | None] | None:
    """Hash part and name, if this part of a URL says them."""
    if is_hash_part(segment[:HASH_PART_LENGTH]) and segment[HASH_PART_LENGTH:] in _OBJECTS:
        return segment[:HASH_PART_LENGTH], None
    path = _store_path(segment)
    return None if path is None else (path.hash_part, path.name)


def _store_path(text: str) -> StorePath | None:
    try:
        return StorePath.parse(text)
    except BadInput:
        return None


def _names_behind(text: str, path: StorePath, location: StoreLocation) -> Names:
    """What follows the store path that a file name leads to, whether or not it is there."""
    parts = Path(os.path.abspath(text)).parts  # noqa: PTH100  `..` is to be taken out, as far as it can be
    roots = [path.full(directory) for directory in (location.store_dir, location.real_store_dir)]
    for number in range(2, len(parts) + 1):
        step = "/".join(("", *parts[1:number]))
        for root in roots:
            for reached in (step, os.path.realpath(step)):
                if reached == root or reached.startswith(f"{root}/"):
                    return (*split(reached[len(root) :]), *parts[number:])
    return ()
