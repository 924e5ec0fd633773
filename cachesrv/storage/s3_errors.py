"""What S3, and the way to it, say when they fail: as our errors, in words that say what to do.

Codes are those of the S3 API reference ("Error responses"), and of Ceph and MinIO where they differ. A failure that
may pass becomes TryAgain or SlowDown; all else is final. That an object is not there is taken from nothing but an
answer that says so (NoSuchKey): a plain 404 can come from any proxy, and 403 is what S3 says of objects that are not
there to those who may not list the bucket.
"""

from __future__ import annotations

import html
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import botocore.exceptions as sdk

from cachesrv.errors import BadInput, CachesrvError, NotFound, StoreError, StoreFull, StoreRefused
from cachesrv.storage.decorators import SlowDown, TryAgain

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ERROR_BODY = 2**16
"""Bytes of an error's body that are looked at."""

_FARTHEST_CLOCK = 300
"""Seconds by which a clock may be wrong before it is named as the cause. S3 itself refuses at 900."""


class Exists(StoreError):
    """A conditional write found an object; or the object that was read has been replaced."""


class UploadGone(StoreError):
    """A multipart upload has been completed or aborted already."""


class Denied(StoreRefused):
    """The credentials are good, and not for this."""


class NotImplementedThere(StoreError):
    """The endpoint does not know what was asked of it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, for messages: the operation as the API calls it, and of which URL (without its query)."""

    operation: str
    target: str

    def __str__(self) -> str:
        return f"{self.operation} {self.target}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is no success. `code` is S3's own word, empty where there is none; header names are in lower
    case.
    """

    status: int
    code: str
    message: str
    region: str
    headers: Mapping[str, str]

    @classmethod
    def parse(cls, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
        """From an answer of HTTP, whatever its body is."""
        text = body[:MAX_ERROR_BODY].decode(errors="replace")
        lower = {name.lower(): value for name, value in headers.items()}
        region = lower.get("x-amz-bucket-region") or _element("Region", text)
        return cls(status, _element("Code", text), _element("Message", text), region, lower)

    @classmethod
    def of_sdk(cls, error: sdk.ClientError) -> Answer:
        """From what the SDK made of one. Answers to HEAD have no body; the SDK puts their status for the code."""
        said = error.response.get("Error", {})
        meta = error.response.get("ResponseMetadata", {})
        headers = {name.lower(): value for name, value in meta.get("HTTPHeaders", {}).items()}
        code = said.get("Code") or ""
        region = headers.get("x-amz-bucket-region") or str(said.get("Region", ""))
        status = meta.get("HTTPStatusCode", 0)
        return cls(status, "" if code.isdigit() else code, said.get("Message") or "", region, headers)


def _element(name: str, text: str) -> str:
    found = re.search(rf"<{name}>([^<]{{0,500}})</{name}>", text)
    return " ".join(html.unescape(found[1]).split()) if found else ""


_EXPIRED = "the credentials have expired: renew them; those from variables and from a file are read at the start"
_FINAL = {
    "NoSuchBucket": "there is no such bucket: check bucket, region and endpoint in the configuration",
    "InvalidBucketName": "no bucket can have this name: check it in the configuration",
    "AllAccessDisabled": "the bucket, or the account that it belongs to, has been disabled",
    "InvalidAccessKeyId": "the access key is not known there: check the credentials and the endpoint",
    "SignatureDoesNotMatch": "the secret key is not that of the access key: check the credentials, and that no proxy "
    "changes requests on their way",
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": "the session token of the credentials is not valid: renew them",
    "InvalidObjectState": "the object lies in an archive class: restore it, or let no lifecycle rule archive objects",
    "KMS.DisabledException": "the key that encrypts the object is disabled",
    "NotSignedUp": "the account is not signed up for S3",
}
_NOT_THERE = {"NoSuchKey": NotFound, "NoSuchUpload": UploadGone}
_FULL = {
    "EntityTooLarge",
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
    "XMinioStorageFull",
}
_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_TOO_MANY = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_PASSING_STATUSES = {408, 500, 502, 504}
_TOO_MANY_STATUSES = {429, 503}
_PERMISSIONS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject; without s3:ListBucket on the bucket, S3 answers so for what is not there, too",
    "HeadObject": "s3:GetObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads on the bucket",
    "ListObjectsV2": "s3:ListBucket on the bucket",
    "ListParts": "s3:ListMultipartUploadParts",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "UploadPartCopy": "s3:GetObject and s3:PutObject",
}


def named(answer: Answer, request: Request) -> CachesrvError:
    """The error that an answer stands for: NotFound, Exists, UploadGone, BadInput (a range beyond the end), StoreFull,
    TryAgain or SlowDown, NotImplementedThere, Denied, or StoreRefused.
    """
    code, status = answer.code, answer.status
    if code in _NOT_THERE:
        return _NOT_THERE[code](f"{request}: it is not there")
    if status == 412:
        return Exists(f"{request}: another object is there")
    if status == 416:
        return BadInput(f"{request}: the range lies beyond the end")
    if status == 507 or code in _FULL:
        return StoreFull(f"{request}: there is no room for it{_remark(answer)}")
    if code in _TOO_MANY or status in _TOO_MANY_STATUSES:
        return SlowDown(f"{request}: too many requests{_remark(answer)}", after=_retry_after(answer))
    if code in _PASSING or status in _PASSING_STATUSES:
        return TryAgain(f"{request}: failed there{_remark(answer)}", after=_retry_after(answer))
    if status == 404 and not code:
        return TryAgain(f"{request}: a 404 that does not say of what: is the endpoint an S3 server?")
    return _final(answer)(f"{request}: {_words(answer, request)}{_remark(answer)}")


def _final(answer: Answer) -> type[StoreError]:
    if answer.status == 501:
        return NotImplementedThere
    return Denied if answer.code in {"AccessDenied", "AccessDeniedException"} else StoreRefused


def _words(answer: Answer, request: Request) -> str:
    if answer.code in _FINAL:
        return _FINAL[answer.code]
    if answer.status in {301, 307, 308} or answer.code == "AuthorizationHeaderMalformed":
        where = f'set the region "{answer.region}"' if answer.region else "check the region"
        return f"the bucket is in another region: {where} in the configuration"
    if answer.code == "RequestTimeTooSkewed" or (answer.status in {400, 403} and abs(_ahead(answer)) > _FARTHEST_CLOCK):
        return f"the clock of this machine is wrong by {abs(_ahead(answer)):.0f} seconds: set it, as by NTP"
    if answer.status == 403:
        return f"access denied: the credentials need {_PERMISSIONS.get(request.operation, 'more permissions')}"
    return "refused"


def _remark(answer: Answer) -> str:
    said = ": ".join(filter(None, (answer.code, answer.message)))
    return f" ({answer.status}{', ' if said else ''}{said})"


def _retry_after(answer: Answer) -> float:
    """Seconds; dates are not understood."""
    text = answer.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0.0


def _ahead(answer: Answer) -> float:
    """Seconds by which the clock here is ahead of the one there."""
    try:
        return time.time() - parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except ValueError:
        return 0.0


_NO_CREDENTIALS = "no credentials were found: set AWS_PROFILE or AWS_ACCESS_KEY_ID, or give the machine a role"
_CREDENTIALS = (
    sdk.CredentialRetrievalError,
    sdk.InvalidConfigError,
    sdk.PartialCredentialsError,
    sdk.ProfileNotFound,
    sdk.SSOError,
    sdk.TokenRetrievalError,
)
_TLS = "the certificate of the endpoint cannot be verified: check the endpoint, or name its CA in AWS_CA_BUNDLE"


def of_sdk(error: Exception, request: Request) -> CachesrvError:
    """The error for what the SDK raised: for an answer of S3 as by `named`, else for what kept it from one."""
    if isinstance(error, sdk.ClientError):
        return named(Answer.of_sdk(error), request)
    if isinstance(error, sdk.NoCredentialsError):
        return StoreError(f"{request}: {_NO_CREDENTIALS}")
    if isinstance(error, _CREDENTIALS):
        return StoreError(f"{request}: the credentials cannot be had: {error}")
    if isinstance(error, sdk.SSLError):
        return StoreError(f"{request}: {_TLS}")
    if isinstance(error, sdk.HTTPClientError | sdk.ConnectionError):
        return unreachable(error, request)
    return StoreError(f"{request}: {error}")


def foreign(request: Request) -> TryAgain:
    """The error for a success that lacks what S3 says with it: it comes from something in between, or the endpoint is
    something else, and nothing has been done.
    """
    return TryAgain(f"{request}: it was answered by something that is no S3 server: check the endpoint, and proxies")


def untrusted(request: Request) -> StoreError:
    """The error for a TLS certificate that does not hold."""
    return StoreError(f"{request}: {_TLS}")


def unreachable(error: BaseException, request: Request) -> TryAgain:
    """The error for a request that got no answer, or not all of it."""
    # A URL that is named there is signed.
    said = re.sub(r"\?\S+", "?…", " ".join(str(error).split())) or type(error).__name__
    return TryAgain(f"{request}: no answer, or not all of it: {said[:300]}")
