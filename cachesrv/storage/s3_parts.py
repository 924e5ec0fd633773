"""Requests that carry bytes of an object: how many, of what type, and how the server verifies them."""

from __future__ import annotations

import asyncio
import base64
import hashlib

MAX_PARTS = 10_000
MIN_PART_SIZE = 5 * 2**20
MAX_PART_SIZE = 5 * 2**30
MAX_OBJECT_SIZE = 5 * 2**40
"""Limits of S3, in bytes but for the first ("Amazon S3 multipart upload limits")."""

_GROW_AFTER = 5_000
_GROW_EVERY = 450
_HASHED_AT_ONCE = 2**16


def part_size(number: int, size: int | None, least: int) -> int:
    """Bytes of part `number` (from 1) of an object of `size` bytes, so that 10,000 parts are enough. All but the last
    are equally large, as some endpoints demand. Of an object of unknown size that holds for the first 5,000; then they
    double every 450, which comes to more than an object may have.
    """
    if size is not None:
        return max(least, -(-size // MAX_PARTS))
    doublings = max(0, -(-(number - _GROW_AFTER) // _GROW_EVERY))
    return min(MAX_PART_SIZE, least << doublings)


async def content_md5(data: bytes | bytearray) -> str:
    """The value of Content-MD5, by which the server verifies what has arrived."""
    if len(data) <= _HASHED_AT_ONCE:
        return _md5(data)
    return await asyncio.to_thread(_md5, data)


def _md5(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def content_type(key: str) -> str:
    """What Nix itself says when it writes to a bucket."""
    folder, _, name = f"/{key}".rpartition("/")
    if name.endswith(".narinfo"):
        return "text/x-nix-narinfo"
    if name == "nix-cache-info":
        return "text/x-nix-cache-info"
    if folder.endswith("/nar"):
        return "application/x-nix-nar"
    if folder.endswith("/log"):
        return "text/plain; charset=utf-8"
    return "application/json"
