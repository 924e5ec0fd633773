"""What `ls` and `cat` read from: the files of a store path, wherever they are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from cachesrv.errors import BadInput, ConfigError, NotFound
from cachesrv.nix.signing import trusted_keys, verify_any
from cachesrv.nix.store_path import StorePath
from cachesrv.push import wanted
from cachesrv.push.layers import Layers
from cachesrv.push.local_path import LocalPath
from cachesrv.push.pushed import open_pushed
from cachesrv.push.remote import open_remote
from cachesrv.push.remote_path import RemotePath
from cachesrv.push.settings import Given, find_settings
from cachesrv.push.store_location import locate
from cachesrv.push.trusted import trusted_by_nix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from cachesrv.nix.listing import ListingNode
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.nix.signing import PublicKey
    from cachesrv.push.address import Address
    from cachesrv.push.members import Names
    from cachesrv.push.nar_member import Write
    from cachesrv.push.token import TokenSource
    from cachesrv.push.wanted import Wanted


class Contents(Protocol):
    """The files of a store path."""

    async def find(self, names: Names, *, follow: bool = False, recursive: bool = True) -> tuple[Names, ListingNode]:
        """What is at these names, and its names when links were followed; a link at the end is followed only if
        `follow`. Unless `recursive`, what lies deeper than its entries may be left out. Raises NotFound.
        """

    async def copy(self, names: Names, write: Write) -> None:
        """Have the contents of a file written, all links followed. Raises NotFound; BadInput for a directory, and for a
        NAR that is not what its narinfo says.
        """


@dataclass(frozen=True, slots=True)
class Where:
    """What the command line says. `trusted`: one of these keys has to have signed; `check_all`: give nothing away that
    was not checked against the NAR hash.
    """

    cache: str | None = None
    token_file: Path | None = None
    trusted: tuple[PublicKey, ...] = ()
    check_all: bool = False


@asynccontextmanager
async def open_contents(text: str, where: Where, environ: Mapping[str, str]) -> AsyncIterator[tuple[Contents, Names]]:
    """The contents of the store path that is meant (see `cachesrv.push.wanted`), and the names that were given of what
    is inside. Raises NotFound, BadInput, ConfigError, ServerError.
    """
    location = locate(None, environ)
    asked = wanted.parse(text, location)
    async with AsyncExitStack() as stack:

        async def open_cache() -> Contents:
            address, tokens = _cache(asked, where, environ)
            executor = stack.enter_context(ThreadPoolExecutor(1, "nar"))
            cache = await stack.enter_async_context(open_remote(address, tokens))
            info = await cache.narinfo(asked.hash_part)
            _check_name(asked, info, cache.url)
            _check_signatures(info, where.trusted, environ)
            return RemotePath(cache, info, executor, check_all=where.check_all)

        if asked.cache is not None or where.cache is not None or asked.name is None:
            yield await open_cache(), asked.names
            return
        path = StorePath(asked.hash_part, asked.name)
        full = path.full(location.store_dir)
        real = location.real_path(path)
        pushed = stack.enter_context(open_pushed(environ))
        store = None if real is None else LocalPath(full, real)
        yield Layers(pushed, pushed.recorded(full), store, open_cache), asked.names


def _cache(asked: Wanted, where: Where, environ: Mapping[str, str]) -> tuple[Address, TokenSource]:
    address = asked.cache or (wanted.parse_cache(where.cache) if where.cache else None)
    if address is None:
        try:
            settings = find_settings(Given(token_file=where.token_file), environ)
        except ConfigError as error:
            raise NotFound(f"{asked.hash_part}-{asked.name} is not in the store here; {error}") from None
        return settings.address, settings.token
    origin = urlsplit(address.base)
    given = Given(f"{origin.scheme}://{origin.netloc}", where.token_file)  # a token is for all caches of a server
    return address, find_settings(given, environ).token


def _check_name(asked: Wanted, info: NarInfo, url: str) -> None:
    if asked.name not in {None, info.store_path.name}:
        raise NotFound(f"there is no {asked.hash_part}-{asked.name} in {url}, it has {info.store_path}")


def _check_signatures(info: NarInfo, given: tuple[PublicKey, ...], environ: Mapping[str, str]) -> None:
    """By the keys that were given; without any, no key that Nix trusts may be shown to have signed something else."""
    if given:
        if verify_any(info.fingerprint, info.signatures, trusted_keys(given)) is None:
            names = ", ".join(key.name for key in given)
            raise BadInput(f"{info.full_path} is not signed by {names}")
        return
    known = trusted_keys(trusted_by_nix(environ))
    for signature in info.signatures:
        key = known.get(signature.name)
        if key is not None and not key.verify(info.fingerprint, signature):
            raise BadInput(
                f"the signature of {info.full_path} by {key.name} does not hold: either the cache lies, or it has"
                " another key of that name than Nix trusts here"
            )
