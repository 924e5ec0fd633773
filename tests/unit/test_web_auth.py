"""Tokens in `Authorization`."""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.errors import NotAuthenticated
from cachesrv.web.auth import token_in


def basic(text: str) -> str:
    return f"Basic {b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, None),
        ("Bearer t", "t"),
        ("bearer t", "t"),
        ("BEARER   t  ", "t"),
        (basic("user:t"), "t"),
        (basic(":t"), "t"),
        (basic("user:t:with:colons"), "t:with:colons"),
        (basic("user:tökén"), "tökén"),
        (f"Bearer {'t' * 4096}", "t" * 4096),
    ],
)
def test_where_it_is(header: str | None, token: str | None) -> None:
    assert token_in(header) == token


@pytest.mark.parametrize(
    "header",
    [
        "",
        " ",
        "Bearer",
        "Bearer ",
        "Basic",
        "Basic ",
        "Basic !!!",
        "Basic dDp",
        basic("no colon"),
        basic("user:"),
        f"Basic {b64encode(bytes([0xFF, 0x3A, 0xFF])).decode()}",
        "Digest t",
        "t",
        f"Bearer {'t' * 4097}",
        "Basic dTp0\ud800",
    ],
)
def test_what_holds_none(header: str) -> None:
    with pytest.raises(NotAuthenticated, match="Authorization"):
        token_in(header)


@given(st.text(max_size=30) | st.text(max_size=30).map(lambda text: f"Basic {text}"))
def test_anything_gives_a_token_or_a_refusal(header: str) -> None:
    with suppress(NotAuthenticated):
        assert token_in(header)
