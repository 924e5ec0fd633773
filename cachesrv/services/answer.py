"""What a narinfo request is answered with: made once, when a path is published, and kept in the index."""

from __future__ import annotations

from hashlib import sha256

from cachesrv.index.base import Present

NARINFO_TYPE = "text/x-nix-narinfo"
NARINFO_MAX_AGE = 3600
"""Seconds. A narinfo can gain signatures, and a path can be collected: a proxy should not hold it for long."""


def present(narinfo: bytes) -> Present:
    """The answer that carries this narinfo.

    The header fields are the same for public and private caches: what a request with `Authorization` gets is not kept
    by shared proxies unless it says `public` (RFC 9111, 3.5).
    """
    etag = sha256(narinfo).hexdigest()[:32]
    head = (
        f"Content-Type: {NARINFO_TYPE}\r\nContent-Length: {len(narinfo)}\r\n"
        f'ETag: "{etag}"\r\nCache-Control: max-age={NARINFO_MAX_AGE}\r\n\r\n'
    )
    return Present(head.encode("ascii"), narinfo)
