"""Names of buckets as Nix writes them: `s3://bucket/prefix?region=…&endpoint=…&scheme=…`.

Source: the Nix manual, "S3 Binary Cache Store". `endpoint` is a host there, and `scheme` how it is spoken to; here a
URL is understood as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from cachesrv.errors import BadInput

_KNOWN = {"region", "endpoint", "scheme"}


@dataclass(frozen=True, slots=True)
class BucketUrl:
    """`prefix` is empty or a key; `endpoint` is a URL, None for AWS."""

    bucket: str
    prefix: str
    region: str | None
    endpoint: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises BadInput."""
        url = urlsplit(text)
        given = dict(parse_qsl(url.query, keep_blank_values=True))
        if url.scheme != "s3" or not url.netloc or url.fragment:
            raise BadInput(f"{text!r} is not the URL of a bucket, such as s3://bucket?region=eu-central-1")
        if unknown := given.keys() - _KNOWN:
            known = ", ".join(sorted(_KNOWN))
            raise BadInput(f"{text!r}: {', '.join(sorted(unknown))} is not understood; there are {known}")
        endpoint = given.get("endpoint")
        if endpoint and "://" not in endpoint:
            endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
        return cls(url.netloc, url.path.strip("/"), given.get("region"), endpoint)
