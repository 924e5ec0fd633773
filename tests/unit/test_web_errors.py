"""Errors as answers."""

from __future__ import annotations

import json
from inspect import getmembers, isclass
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from cachesrv import errors
from cachesrv.web import errors as web_errors
from cachesrv.web.errors import MethodNotAllowed, UnknownCoding, answer, middleware, status_of
from cachesrv.web.ranges import Unsatisfiable

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

EVERY = [kind for _, kind in getmembers(errors, isclass) if issubclass(kind, errors.CachesrvError)]
SECRET = "cannot write /srv/cachesrv/objects/main/x: select * from paths"


def raising(error: BaseException) -> Handler:
    async def handler(_request: web.Request) -> web.StreamResponse:
        raise error

    return handler


def text(response: web.StreamResponse) -> str:
    assert isinstance(response, web.Response)
    assert response.text is not None
    return response.text


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind is not errors.CachesrvError])
def test_every_error_has_its_status(kind: type[errors.CachesrvError]) -> None:
    status = status_of(kind("x"))
    assert 400 <= status < 600
    ours = issubclass(kind, errors.StoreError | errors.PeerError | errors.ConfigError)
    assert (status >= 500) == ours, "what the client can mend is 4xx, what it cannot is 5xx"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.BadInput("x"), 400),
        (errors.TooLarge("x"), 413),
        (errors.Mismatch("x"), 422),
        (errors.NotFound("x"), 404),
        (errors.Conflict("x"), 409),
        (errors.MissingNar("x"), 422),
        (errors.MissingReferences("x"), 422),
        (errors.Unsigned("x"), 422),
        (errors.NotAuthenticated("x"), 401),
        (errors.NotAllowed("x"), 403),
        (errors.StoreFull("x"), 507),
        (errors.StoreUnavailable("x"), 503),
        (errors.StoreError("x"), 500),
        (web_errors.BodyTooSlow("x"), 408),
        (UnknownCoding("x"), 415),
        (MethodNotAllowed("x", ["GET"]), 405),
        (Unsatisfiable(5), 416),
    ],
)
def test_statuses(error: errors.CachesrvError, status: int) -> None:
    response = answer(make_mocked_request("GET", "/"), error)
    assert response.status == status
    assert response.headers["Cache-Control"] == "no-store"
    assert text(response).count("\n") == 1


@pytest.mark.parametrize("kind", [errors.StoreError, errors.StoreFull, errors.StoreUnavailable, errors.PeerError])
def test_how_things_are_inside_is_for_the_operator(kind: type[errors.CachesrvError]) -> None:
    with capture_logs() as logs:
        response = answer(make_mocked_request("GET", "/main/x"), kind(SECRET))
    assert "/srv" not in text(response)
    assert "select" not in text(response)
    (entry,) = logs
    assert entry["error"] == SECRET
    assert entry["path"] == "/main/x"


def test_how_much_room_is_missing_is_for_the_client() -> None:
    response = answer(make_mocked_request("PUT", "/main/nar/x"), errors.StoreFull(SECRET, missing=3 * 2**20 + 1))
    assert "no room for this, 3.0 MiB are missing" in text(response)
    assert "/srv" not in text(response)


def test_what_the_client_did_is_for_the_client() -> None:
    with capture_logs() as logs:
        response = answer(make_mocked_request("GET", "/"), errors.BadInput("two\nlines\tand  blanks"))
    assert text(response) == "two lines and blanks\n"
    assert [log["log_level"] for log in logs] == ["debug"]


def test_fields_that_belong_to_a_status() -> None:
    request = make_mocked_request("GET", "/")
    assert answer(request, errors.NotAuthenticated("x")).headers["WWW-Authenticate"].startswith("Basic ")
    assert "WWW-Authenticate" not in answer(request, errors.NotAllowed("x")).headers
    assert answer(request, MethodNotAllowed("x", ["GET", "PUT"])).headers["Allow"] == "GET, PUT"
    assert answer(request, Unsatisfiable(5)).headers["Content-Range"] == "bytes */5"
    with capture_logs():
        assert int(answer(request, errors.StoreUnavailable("x")).headers["Retry-After"]) > 0


def test_programs_get_json() -> None:
    response = answer(make_mocked_request("GET", "/api/v1/caches/main"), errors.NotFound('no "such" thing'))
    assert json.loads(text(response)) == {"error": 'no "such" thing'}
    assert response.content_type == "application/json"


async def test_a_defect_is_told_to_the_operator_only() -> None:
    with capture_logs() as logs:
        response = await middleware(make_mocked_request("GET", "/"), raising(ValueError(SECRET)))
    assert response.status == 500
    assert "select" not in text(response)
    (entry,) = logs
    assert entry["event"] == "defect"
    assert entry["exc_info"]


async def test_errors_become_answers() -> None:
    response = await middleware(make_mocked_request("GET", "/"), raising(errors.NotFound("x")))
    assert response.status == 404


@pytest.mark.parametrize("error", [errors.StoreError("x"), ValueError("x")])
async def test_an_answer_that_breaks_off_ends_the_connection(error: Exception) -> None:
    """It must not look whole: there is no second answer in the middle of the first one."""
    request = make_mocked_request("GET", "/")
    request[web_errors.BEGUN] = True
    with capture_logs(), pytest.raises(ConnectionResetError):
        await middleware(request, raising(error))
    assert request.transport is not None
    request.transport.abort.assert_called_once_with()  # type: ignore[attr-defined]  # it is a mock


@pytest.mark.parametrize("error", [ConnectionResetError("x"), web.HTTPMethodNotAllowed("PUT", ["GET"])])
async def test_what_is_passed_on(error: Exception) -> None:
    with pytest.raises(type(error)):
        await middleware(make_mocked_request("GET", "/"), raising(error))
