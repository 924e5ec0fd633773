"""Ed25519 keys and signatures in Nix's form `<key name>:<base64>`, and the text that is signed.

    secret key   <name>:<64 bytes: seed, then public key>
    public key   <name>:<32 bytes>
    signature    <name>:<64 bytes>

The name ends at the first colon. It is how a client finds the key for a signature; nothing proves it.
A path's signature covers its store path, NAR hash, NAR size and references, and nothing else: neither
URL nor compression, deriver or content address.

Source: Nix, `src/libutil/signature/local-keys.cc`, `src/libstore/path-info.cc`.
Base-64 has to be padded and canonical here; Nix is laxer.
"""

import binascii
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from nacl import bindings
from nacl.exceptions import BadSignatureError

from cachesrv.errors import BadInput
from cachesrv.nix.hashes import Hash

_SEED_SIZE = 32
_SECRET_SIZE = 64
_PUBLIC_SIZE = 32
_SIGNATURE_SIZE = 64

# No blanks: Nix keeps a path's signatures in one blank-separated column.
_match_key_name = re.compile(r"[!-9;-~]{1,255}").fullmatch


@dataclass(frozen=True, slots=True)
class Signature:
    """64 bytes (BadInput otherwise) that the key named `name` is said to have made."""

    name: str
    data: bytes

    def __post_init__(self) -> None:
        _check(self.name, self.data, _SIGNATURE_SIZE, "signature")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<name>:<base64>`; raises BadInput."""
        return cls(*_split(text, "signature"))

    def render(self) -> str:
        """`<name>:<base64>`"""
        return _join(self.name, self.data)

    def __str__(self) -> str:
        return self.render()


@dataclass(frozen=True, slots=True)
class PublicKey:
    """32 bytes (BadInput otherwise) and the name under which clients trust them."""

    name: str
    data: bytes

    def __post_init__(self) -> None:
        _check(self.name, self.data, _PUBLIC_SIZE, "public key")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<name>:<base64>`, blanks and line breaks after it allowed; raises BadInput."""
        return cls(*_split(text.rstrip(), "public key"))

    def render(self) -> str:
        """`<name>:<base64>`"""
        return _join(self.name, self.data)

    def verify(self, fingerprint: bytes, signature: Signature) -> bool:
        """Whether the signature bears this key's name and was made by it over `fingerprint`."""
        if signature.name != self.name:
            return False
        try:
            bindings.crypto_sign_open(signature.data + fingerprint, self.data)
        except BadSignatureError:
            return False
        return True

    def __str__(self) -> str:
        return self.render()


@dataclass(frozen=True, slots=True)
class SecretKey:
    """Seed and public key, 64 bytes that belong together (BadInput otherwise); repr and str hide them."""

    name: str
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.name, self.data, _SECRET_SIZE, "secret key")
        # With a foreign public half, signatures would not hold and would give the seed away.
        if bindings.crypto_sign_seed_keypair(self.data[:_SEED_SIZE])[0] != self.data[_SEED_SIZE:]:
            raise BadInput(f"the two halves of the secret key {self.name} do not belong together")

    @classmethod
    def generate(cls, name: str) -> Self:
        """A new key from the system's randomness; raises BadInput for a name that no key may have."""
        return cls(name, bindings.crypto_sign_keypair()[1])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<name>:<base64>`, blanks and line breaks after it allowed; raises BadInput."""
        return cls(*_split(text.rstrip(), "secret key"))

    def render(self) -> str:
        """`<name>:<base64>`, for a file of mode 0600 and nowhere else."""
        return _join(self.name, self.data)

    @property
    def public(self) -> PublicKey:
        """The public half under the same name."""
        return PublicKey(self.name, self.data[_SEED_SIZE:])

    def sign(self, fingerprint: bytes) -> Signature:
        """The signature over `fingerprint`; the same each time."""
        return Signature(self.name, bindings.crypto_sign(fingerprint, self.data)[:_SIGNATURE_SIZE])


def fingerprint(store_path: str, nar_hash: Hash, nar_size: int, references: Iterable[str]) -> bytes:
    """The bytes that a path's signature is over; paths are full, in any order.

    `1;<store path>;sha256:<nix32>;<NAR size>;<reference>,<reference>…`, references sorted and without
    repetition, the path itself among them where it refers to itself.
    """
    paths = ",".join(sorted(set(references)))
    return f"1;{store_path};{nar_hash.nix32};{nar_size};{paths}".encode()


def trusted_keys(keys: Iterable[PublicKey]) -> dict[str, PublicKey]:
    """The keys by name; of several with one name the first counts, as it does for Nix."""
    trusted: dict[str, PublicKey] = {}
    for key in keys:
        trusted.setdefault(key.name, key)
    return trusted


def readable_signatures(texts: Iterable[str]) -> tuple[Signature, ...]:
    """Those that are signatures. A store keeps whatever a cache has told it, and what cannot be read proves nothing."""
    found = []
    for text in texts:
        with suppress(BadInput):
            found.append(Signature.parse(text))
    return tuple(found)


def verify_any(
    fingerprint: bytes, signatures: Iterable[Signature], trusted: Mapping[str, PublicKey]
) -> Signature | None:
    """The first signature that one of the trusted keys (by name) made over `fingerprint`, if any."""
    for signature in signatures:
        key = trusted.get(signature.name)
        if key is not None and key.verify(fingerprint, signature):
            return signature
    return None


def _split(text: str, what: str) -> tuple[str, bytes]:
    """Name and bytes of `<name>:<base64>`; `text` may be secret, so that no message repeats it."""
    name, colon, encoded = text.partition(":")
    try:
        data = binascii.a2b_base64(encoded)
    except ValueError:
        data = b""
    # The decoder skips what it does not know; only the canonical text encodes to itself.
    if not colon or not data or binascii.b2a_base64(data, newline=False).decode("ascii") != encoded:
        raise BadInput(f"a {what} has to be <key name>:<base64>")
    return name, data


def _join(name: str, data: bytes) -> str:
    return f"{name}:{binascii.b2a_base64(data, newline=False).decode('ascii')}"


def _check(name: str, data: bytes, size: int, what: str) -> None:
    if _match_key_name(name) is None:
        raise BadInput(f"the name of a {what} has to be 1 to 255 printable characters, no blank and no colon")
    if len(data) != size:
        raise BadInput(f"a {what} has {size} bytes, not {len(data)}")
