from __future__ import annotations

from email.utils import formatdate

import botocore.exceptions as sdk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, CachesrvError, NotFound, StoreError, StoreFull, StoreUnavailable
from cachesrv.storage.decorators import SlowDown, TryAgain
from cachesrv.storage.s3_errors import (
    Answer,
    Denied,
    Exists,
    NotImplementedThere,
    Request,
    UploadGone,
    named,
    of_sdk,
    unreachable,
)

REQUEST = Request("GetObject", "s3://bkt/main/a at https://s3.example.org")


def answer(status: int, code: str = "", message: str = "", **headers: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    return Answer.parse(status, {k.replace("_", "-"): v for k, v in headers.items()}, body.encode())


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFound),
        (404, "NoSuchUpload", UploadGone),
        (404, "", TryAgain),
        (412, "PreconditionFailed", Exists),
        (412, "", Exists),
        (409, "ConditionalRequestConflict", TryAgain),
        (416, "InvalidRange", BadInput),
        (507, "", StoreFull),
        (403, "QuotaExceeded", StoreFull),
        (400, "EntityTooLarge", StoreFull),
        (503, "SlowDown", SlowDown),
        (503, "", SlowDown),
        (429, "", SlowDown),
        (400, "RequestTimeout", TryAgain),
        (400, "BadDigest", TryAgain),
        (500, "InternalError", TryAgain),
        (502, "", TryAgain),
        (504, "", TryAgain),
        (501, "NotImplemented", NotImplementedThere),
        (403, "AccessDenied", Denied),
    ],
)
def test_kinds(status: int, code: str, kind: type[CachesrvError]) -> None:
    assert type(named(answer(status, code), REQUEST)) is kind


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (answer(404, "NoSuchBucket"), "no such bucket: check bucket, region and endpoint in the conf"),
        (answer(403, "InvalidAccessKeyId"), "the access key is not known there"),
        (answer(403, "SignatureDoesNotMatch"), "the secret key is not that of the access key"),
        (answer(400, "ExpiredToken"), "the credentials have expired: renew them; those from variables"),
        (answer(400, "InvalidToken"), "the session token of the credentials is not valid"),
        (answer(301, x_amz_bucket_region="eu-west-1"), 'in another region: set the region "eu-west-1"'),
        (answer(307), "in another region: check the region"),
        (answer(403, "AccessDenied"), "the credentials need s3:GetObject; without s3:ListBucket"),
        (answer(403, "AccessDenied", "no &lt;you&gt;"), "(403, AccessDenied: no <you>)"),
        (answer(403, "InvalidObjectState"), "the object lies in an archive class"),
        (answer(418), "refused (418)"),
    ],
)
def test_words(said: Answer, words: str) -> None:
    error = named(said, REQUEST)
    assert isinstance(error, StoreError)
    assert str(error).startswith("GetObject s3://bkt/main/a at https://s3.example.org: ")
    assert words in str(error)
    assert not isinstance(error, StoreUnavailable)


@pytest.mark.parametrize("code", ["", "AccessDenied", "RequestTimeTooSkewed"])
@pytest.mark.parametrize("ahead", [-4000, 400])
def test_a_wrong_clock(monkeypatch: pytest.MonkeyPatch, code: str, ahead: int) -> None:
    monkeypatch.setattr("cachesrv.storage.s3_errors.time.time", lambda: 2_000_000_000.0)
    error = named(answer(403, code, date=formatdate(2_000_000_000 - ahead)), REQUEST)
    assert f"the clock of this machine is wrong by {abs(ahead)} seconds: set it" in str(error)


def test_the_region_that_the_body_names() -> None:
    body = (
        b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong</Message>"
        b"<Region>eu-west-1</Region></Error>"
    )
    assert 'set the region "eu-west-1"' in str(named(Answer.parse(400, {}, body), REQUEST))


@pytest.mark.parametrize(("text", "seconds"), [("7", 7), ("", 0), ("-1", 0), ("Fri, 1 Jan 2027 00:00:00 GMT", 0)])
def test_retry_after(text: str, seconds: float) -> None:
    error = named(Answer.parse(503, {"Retry-After": text}, b""), REQUEST)
    assert isinstance(error, SlowDown)
    assert error.after == seconds


CLIENT_ERROR = {
    "Error": {"Code": "AccessDenied", "Message": "no"},
    "ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": {}},
}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (sdk.ClientError(CLIENT_ERROR, "GetObject"), Denied, "s3:GetObject"),  # type: ignore[arg-type]  # enough of it
        (sdk.NoCredentialsError(), StoreError, "no credentials were found"),
        (sdk.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), StoreError, "AWS_SECRET"),
        (sdk.ProfileNotFound(profile="x"), StoreError, "the credentials cannot be had"),
        (sdk.EndpointConnectionError(endpoint_url="http://h"), TryAgain, "no answer"),
        (sdk.ConnectTimeoutError(endpoint_url="http://h"), TryAgain, "no answer"),
        (sdk.ReadTimeoutError(endpoint_url="http://h"), TryAgain, "no answer"),
        (sdk.SSLError(endpoint_url="http://h", error=OSError()), StoreError, "AWS_CA_BUNDLE"),
        (sdk.UnknownServiceError(service_name="x", known_service_names=[]), StoreError, "x"),
    ],
)
def test_what_the_sdk_raises(error: Exception, kind: type[CachesrvError], words: str) -> None:
    ours = of_sdk(error, REQUEST)
    assert type(ours) is kind
    assert words in str(ours)


def test_a_connection_that_says_nothing() -> None:
    assert "TimeoutError" in str(unreachable(TimeoutError(), REQUEST))
    assert "\n" not in str(unreachable(OSError("a\nb"), REQUEST))


def test_signatures_stay_out_of_messages() -> None:
    error = OSError("Connection timeout to host http://h/bkt/main/a?X-Amz-Signature=abc&X-Amz-Date=1, sorry")
    assert str(unreachable(error, REQUEST)).endswith("Connection timeout to host http://h/bkt/main/a?… sorry")


@given(
    st.integers(100, 599),
    st.dictionaries(st.sampled_from(["Retry-After", "Date", "x-amz-bucket-region"]), st.text(max_size=30)),
    st.binary(max_size=200) | st.text(alphabet="<>/CodeMsgRin&lt;#0x", max_size=100).map(str.encode),
)
@settings(max_examples=300, deadline=None)
def test_any_answer_is_an_error_of_ours(status: int, headers: dict[str, str], body: bytes) -> None:
    error = named(Answer.parse(status, headers, body), REQUEST)
    assert isinstance(error, CachesrvError)
    assert len(str(error)) < 1500
    assert isinstance(error, NotFound) == (b"<Code>NoSuchKey</Code>" in body)
