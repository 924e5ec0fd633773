"""The post-build-hook of Nix: puts what was built into the queue.

Nix (at least to 2.34) builds nothing else while a hook runs, and gives up the whole build when one fails: its outputs
stay valid, what depends on them is not built. A cache that lacks a path is slower, a build that fails is wrong. So
whatever goes wrong here is told, for the build's log, and is no failure.

`$OUT_PATHS` are store paths with spaces between them, `$DRV_PATH` is the derivation. Nix 2.8.0 leaves `$OUT_PATHS`
empty: the outputs are then found by way of the derivation. [Nix, manual, advanced-topics/post-build-hook]
"""

from __future__ import annotations

import os

from cachesrv.errors import ConfigError, StoreError
from cachesrv.push.queue.directory import queue_directory
from cachesrv.push.queue.spool import put, wake

_LONGEST = 4096


def hook(queue: str | None = None) -> None:
    """Queue what the environment names. Raises nothing: what goes wrong is told on stderr."""
    before = os.umask(0o077)  # one that takes the owner's own rights away would lock the owner out
    try:
        _queue(queue)
    except Exception as error:  # noqa: BLE001  see above: a defect of ours must not stop a build either
        _tell(f"defect, please report it: {type(error).__name__}: {error}")
    finally:
        os.umask(before)


def _queue(given: str | None) -> None:
    words = os.environb.get(b"OUT_PATHS", b"").split()
    outputs = [word for word in words if _may_be_path(word)]
    for word in words:
        if not _may_be_path(word):
            _tell(f"not a store path in $OUT_PATHS: {word[:300]!r}")
    deriver = os.environb.get(b"DRV_PATH", b"").strip()
    if not _may_be_path(deriver):
        deriver = b""
    if not outputs and (words or not deriver):
        _tell("nothing to queue: Nix sets $OUT_PATHS and $DRV_PATH for its post-build-hook")
        return
    try:
        queue = queue_directory(given, os.environ)
        try:
            put(queue, outputs, deriver)
        except OSError as error:
            raise StoreError(f"the queue {queue} cannot be written: {error.strerror}") from error
    except (ConfigError, StoreError) as error:
        named = b" ".join(outputs or [deriver]).decode(errors="backslashreplace")
        _tell(f"{error}; nobody will push {named}")
        return
    wake(queue)


def _may_be_path(word: bytes) -> bool:
    """Whether it is worth to be queued; the queue looks closer."""
    return word.startswith(b"/") and len(word) <= _LONGEST and word.isascii() and not _has_control(word)


def _has_control(word: bytes) -> bool:
    return min(word) <= 0x20 or 0x7F in word


def _tell(message: str) -> None:
    try:
        os.write(2, f"cachesrv hook: {message}\n".encode(errors="backslashreplace"))
    except OSError:  # nobody listens
        return
