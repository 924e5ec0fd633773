"""Who sends a request: the token in `Authorization`, as Bearer or as the password of Basic (any user), so that netrc
works everywhere.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import TYPE_CHECKING

from cachesrv.errors import NotAuthenticated

if TYPE_CHECKING:
    from aiohttp import web

_LONGEST = 4096


def token_of(request: web.BaseRequest) -> str | None:
    """The token that the request carries, None without one. Raises NotAuthenticated for a garbled one."""
    return token_in(request.headers.get("Authorization"))


def token_in(header: str | None) -> str | None:
    """The token in the value of an `Authorization` header."""
    if header is None:
        return None
    scheme, _, value = header.strip().partition(" ")
    value = value.strip()
    if value and len(value) <= _LONGEST and value.isascii():
        if scheme.lower() == "bearer":
            return value
        if scheme.lower() == "basic":
            return _password(value)
    raise NotAuthenticated("Authorization: expected Bearer with the token, or Basic with the token as password")


def _password(encoded: str) -> str:
    try:
        _, colon, password = b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise NotAuthenticated("Authorization: Basic is not followed by base-64 of user:token") from error
    if not colon or not password:
        raise NotAuthenticated("Authorization: Basic has no password, which is where the token belongs")
    return password
