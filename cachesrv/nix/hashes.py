"""Hashes with the name of their algorithm, in all the forms that Nix writes and reads.

    sha256:<nix32>    what Nix writes in narinfos, signatures and content addresses
    sha256:<base16>   what Nix hashes into store paths and keeps in its database
    sha256:<base64>   read only
    sha256-<base64>   SRI, as in web pages

The first three are told apart by length alone, which is possible for each algorithm.
Source: Nix, `src/libutil/hash.cc`. Base-64 has to be padded and canonical here.
"""

import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from cachesrv.errors import BadInput
from cachesrv.nix import base32

SIZES: Mapping[str, int] = MappingProxyType({"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64})
"""Bytes of the digest of each algorithm that store paths may be made with."""


@dataclass(frozen=True, slots=True)
class Hash:
    """A digest; `algorithm` is a key of SIZES and `digest` has that many bytes, else BadInput."""

    algorithm: str
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != _size(self.algorithm):
            raise BadInput(f"a {self.algorithm} digest does not have {len(self.digest)} bytes")

    @classmethod
    def of(cls, algorithm: str, data: bytes) -> Self:
        """The hash of `data`."""
        _size(algorithm)
        return cls(algorithm, hashlib.new(algorithm, data, usedforsecurity=False).digest())

    @classmethod
    def parse(cls, text: str, algorithm: str | None = None) -> Self:
        """Read any of the forms above; those without a prefix too where `algorithm` is given.

        Raises BadInput for an unknown algorithm, one that differs from `algorithm`, or a digest that
        has the wrong length or is not in one of the encodings.
        """
        stated, separator, digits = text.partition(":")
        if not separator:
            stated, separator, digits = text.partition("-")
        if not separator:
            if algorithm is None:
                raise BadInput(f"hash {text[:150]!r} does not begin with its algorithm")
            stated, digits = algorithm, text
        elif algorithm is not None and stated != algorithm:
            raise BadInput(f"hash {text[:150]!r} is not of {algorithm}")
        size = _size(stated)
        return cls(stated, _from_base64(digits, size) if separator == "-" else _decode(digits, size))

    @property
    def bare_nix32(self) -> str:
        """The digest in Nix's base-32, as in names of NARs."""
        return base32.encode(self.digest)

    @property
    def nix32(self) -> str:
        """`sha256:<nix32>`"""
        return f"{self.algorithm}:{base32.encode(self.digest)}"

    @property
    def base16(self) -> str:
        """`sha256:<lower-case base16>`"""
        return f"{self.algorithm}:{self.digest.hex()}"

    @property
    def sri(self) -> str:
        """`sha256-<base64>`"""
        return f"{self.algorithm}-{binascii.b2a_base64(self.digest, newline=False).decode('ascii')}"

    def __str__(self) -> str:
        return self.nix32


def _size(algorithm: str) -> int:
    size = SIZES.get(algorithm)
    if size is None:
        raise BadInput(f"{algorithm[:40]!r} is not a hash algorithm of store paths ({', '.join(SIZES)})")
    return size


def _decode(digits: str, size: int) -> bytes:
    length = len(digits)
    if length == base32.encoded_length(size):
        return base32.decode(digits, size)
    if length == size * 2:
        return _from_base16(digits)
    return _from_base64(digits, size)


def _from_base16(digits: str) -> bytes:
    try:
        # Unlike bytes.fromhex() it does not pass over blanks.
        return binascii.unhexlify(digits)
    except ValueError:
        raise BadInput(f"{digits[:150]!r} is not base-16") from None


def _from_base64(digits: str, size: int) -> bytes:
    """The one text that encodes a digest: no line breaks, full padding, no stray bits."""
    try:
        digest = binascii.a2b_base64(digits)
    except ValueError:
        digest = b""
    if len(digest) != size or binascii.b2a_base64(digest, newline=False) != digits.encode("ascii"):
        raise BadInput(f"{digits[:150]!r} is not a digest of {size} bytes in base-16, base-32 or base-64")
    return digest
