"""Signatures added to a narinfo as it lies there: every other byte stays, lines that nobody knows among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.nix import narinfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.nix.signing import SecretKey

_SIGNATURE = b"Sig: "
_ADDRESS = b"CA: "


def sign(data: bytes, keys: Iterable[SecretKey]) -> bytes:
    """The narinfo with one signature by each key, in place of those under the same key names; the same bytes when it
    has them already. New ones stand where Nix writes them: after other signatures, before a content address.

    Raises BadInput for what is no narinfo.
    """
    fingerprint = narinfo.parse(data).fingerprint
    lines = data[:-1].split(b"\n")
    for key in keys:
        line = _SIGNATURE + key.sign(fingerprint).render().encode("ascii")
        lines = _with_line(lines, line, _SIGNATURE + key.name.encode("ascii") + b":")
    return b"\n".join(lines) + b"\n"


def _with_line(lines: list[bytes], line: bytes, beginning: bytes) -> list[bytes]:
    own = [number for number, other in enumerate(lines) if _begins(other, beginning)]
    kept = [other for number, other in enumerate(lines) if number not in own]
    position = own[0] if own else _position(lines)
    return [*kept[:position], line, *kept[position:]]


def _position(lines: list[bytes]) -> int:
    signatures = [number for number, line in enumerate(lines) if _begins(line, _SIGNATURE)]
    addresses = [number for number, line in enumerate(lines) if _begins(line, _ADDRESS)]
    return signatures[-1] + 1 if signatures else addresses[0] if addresses else len(lines)


def _begins(line: bytes, beginning: bytes) -> bool:
    """As Nix reads it: whatever stands behind the colon counts as the blank."""
    end = beginning.index(b":") + 1
    return line.startswith(beginning[:end]) and line[end + 1 :].startswith(beginning[end + 1 :])
