"""Who may do what."""

from __future__ import annotations

import itertools
import time
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from cachetools import TLRUCache

from cachesrv.catalog.base import TokenRecord
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.errors import NotAllowed, NotAuthenticated
from cachesrv.services import access
from cachesrv.services.access import Access, Principal, new_token, token_hash

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FIXED, STORED = "fixed-token", "stored-token"
NOW = int(time.time())


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[SqlCatalog]:
    catalog = await SqlCatalog.open(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    yield catalog
    await catalog.close()


def holds(*permissions: str, caches: tuple[str, ...] = ("*",)) -> Principal:
    return Principal("holder", caches, frozenset(permissions))


def record(*, expires_at: int | None = None, revoked_at: int | None = None) -> TokenRecord:
    return TokenRecord("stored", token_hash(STORED), ("team-*",), ("push",), NOW, expires_at, revoked_at)


@pytest.mark.parametrize(
    ("principal", "may"),
    [
        (holds("pull"), {"pull"}),
        (holds("push"), {"pull", "push"}),
        (holds("delete"), {"delete"}),
        (holds("admin"), {"admin", "pull", "push", "delete"}),
        (holds(), set()),
        (holds("admin", caches=("other",)), set()),
        (holds("admin", caches=()), set()),
        (holds("pull", caches=("other", "ma?n")), {"pull"}),
        (holds("pull", caches=("MAIN",)), set()),
        (holds("pull", "delete", caches=("m*",)), {"pull", "delete"}),
    ],
)
def test_permissions(principal: Principal, may: set[str]) -> None:
    assert {name for name in ("pull", "push", "delete", "admin") if principal.may(name, "main")} == may


async def test_fixed_tokens(catalog: SqlCatalog) -> None:
    asked = Access([(token_hash(FIXED), holds("push"))], catalog)
    assert await asked.require(FIXED, "push", "main") == holds("push")
    assert asked.remembered(FIXED) == holds("push")
    with pytest.raises(NotAuthenticated, match="needs a token"):
        await asked.require(None, "pull", "main")
    with pytest.raises(NotAuthenticated, match="not valid"):
        await asked.require(token_hash(FIXED), "pull", "main")
    with pytest.raises(NotAllowed, match="'holder' may not delete at main") as caught:
        await asked.require(FIXED, "delete", "main")
    assert not isinstance(caught.value, NotAuthenticated)
    assert FIXED not in str(caught.value)


async def test_tokens_of_the_catalog(catalog: SqlCatalog) -> None:
    asked = Access([], catalog)
    await catalog.put_token(record())
    assert asked.remembered(STORED) is None
    principal = await asked.require(STORED, "push", "team-a")
    assert (principal.name, principal.caches, principal.permissions) == ("stored", ("team-*",), frozenset({"push"}))
    assert asked.remembered(STORED) == principal
    with pytest.raises(NotAllowed):
        await asked.require(STORED, "push", "main")


@pytest.mark.parametrize(
    ("token", "valid"),
    [
        (record(expires_at=NOW + 1000), True),
        (record(expires_at=NOW - 1), False),
        (record(revoked_at=NOW - 1), False),
        (record(expires_at=NOW + 1000, revoked_at=NOW - 1), False),
    ],
)
async def test_tokens_end(catalog: SqlCatalog, token: TokenRecord, valid: bool) -> None:
    await catalog.put_token(token)
    assert (await Access([], catalog).holder(STORED) is not None) == valid


async def test_a_revoked_token_is_refused_soon(catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "REMEMBERED_SECONDS", 0.05)
    asked = Access([], catalog)
    await catalog.put_token(record())
    await asked.require(STORED, "push", "team-a")
    assert await catalog.revoke_token("stored", NOW)
    deadline = time.monotonic() + 10
    while await asked.holder(STORED) is not None:
        assert time.monotonic() < deadline
    assert asked.remembered(STORED) is None


async def test_no_token_is_remembered_beyond_its_end(catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Access([], catalog)
    await catalog.put_token(record(expires_at=NOW + 1000))
    clock = SimpleNamespace(time=lambda: NOW + 999.8)
    monkeypatch.setattr(access, "time", clock)
    assert await asked.holder(STORED) is not None
    clock.time = lambda: NOW + 1000.0
    deadline = time.monotonic() + 10
    while await asked.holder(STORED) is not None:
        assert time.monotonic() < deadline
    assert asked.remembered(STORED) is None


def ends_after(lasts: int, _digest: str, _principal: Principal | None, now: float) -> float:
    return now + lasts


async def test_memory_that_ends_at_any_moment_is_asked_again(catalog: SqlCatalog) -> None:
    """Entries end by the clock, also between two looks at it."""
    asked = Access([], catalog)
    await catalog.put_token(record())
    for lasts in range(1, 8):
        asked._remembered = TLRUCache(8, partial(ends_after, lasts), timer=itertools.count().__next__)
        for _ in range(8):
            assert await asked.holder(STORED) is not None


async def test_what_is_remembered_is_bounded(catalog: SqlCatalog) -> None:
    """Guesses fill the memory no further, and push nothing out that is fixed."""
    asked = Access([(token_hash(FIXED), holds("pull"))], catalog)
    asked._remembered.update({token_hash(str(number)): None for number in range(2 * access._REMEMBERED)})
    assert len(asked._remembered) <= access._REMEMBERED
    assert asked.remembered(FIXED) is not None


def test_new_tokens() -> None:
    """Long, recognisable, and good for a netrc without quotes."""
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        assert token.startswith("csrv_")
        assert len(token) >= 5 + 43
        assert token.isascii()
        assert not set(token) & set(" \t\"'#\\:/@")
