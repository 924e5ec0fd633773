"""Failures have names that programs can decide by, and the server's are among them."""

from __future__ import annotations

import pytest

from cachesrv import errors
from cachesrv.push.failure import Failure
from cachesrv.push.retry import TryAgain
from cachesrv.web.push import KINDS


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.NotFound("x"), "not-found"),
        (errors.Mismatch("x"), "damaged"),
        (errors.TooLarge("x"), "too-large"),
        (errors.BadInput("x"), "bad-input"),
        (errors.Conflict("x"), "conflict"),
        (errors.Unsigned("x"), "unsigned"),
        (errors.Refused("x"), "refused"),
        (errors.StoreUnavailable("x"), "store"),
        (errors.DaemonError("x"), "store"),
        (TryAgain("x"), "server"),
        (errors.ConfigError("x"), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_what_was_raised(error: errors.CachesrvError, kind: str) -> None:
    assert Failure.of(error) == ("x", kind)


def test_the_server_calls_failures_as_we_do() -> None:
    ours = {error: Failure.of(error("x")).kind for error in KINDS}
    assert ours == KINDS
