"""Nix's base-32: one little-endian number, written most significant digit first.

The alphabet leaves out e, o, u and t. N bytes take ceil(N * 8 / 5) characters; the first one carries
the bits that are left over, so that not every character may stand there.

Source: Nix, `src/libutil/base-nix-32.cc`.
"""

from cachesrv.errors import BadInput

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"

# Two digits at a time: half the steps of one at a time.
_PAIRS = tuple(high + low for high in ALPHABET for low in ALPHABET)
# To the digits that int() reads in base 32; all else becomes a byte that it refuses.
_TO_INT_DIGITS = bytes(
    b"0123456789abcdefghijklmnopqrstuv"[ALPHABET.index(chr(byte))] if chr(byte) in ALPHABET else 0xFF
    for byte in range(256)
)


def encoded_length(size: int) -> int:
    """Number of characters that `size` bytes take."""
    return (size * 8 + 4) // 5


def encode(data: bytes) -> str:
    """The bytes as Nix writes them; 32 bytes become 52 characters, 20 become 32."""
    length = encoded_length(len(data))
    number = int.from_bytes(data, "little")
    top = (length - 1) // 2 * 10
    digits = "".join([_PAIRS[number >> shift & 1023] for shift in range(top, -1, -10)])
    return digits[len(digits) - length :]


def decode(text: str, size: int | None = None) -> bytes:
    """The bytes that `text` stands for; `size` is their number where the caller knows it.

    Raises BadInput for a character outside the alphabet, a length that no number of bytes (or not
    `size` bytes) has, and bits set beyond the last byte.
    """
    expected = len(text) * 5 // 8 if size is None else size
    if len(text) != encoded_length(expected):
        raise BadInput(f"{text[:120]!r} has {len(text)} characters, not those of {expected} bytes in base-32")
    try:
        number = int(text.encode("ascii").translate(_TO_INT_DIGITS) or b"0", 32)
        return number.to_bytes(expected, "little")
    except ValueError:
        raise BadInput(f"{text[:120]!r} has characters that are not of Nix's base-32") from None
    except OverflowError:
        raise BadInput(f"{text[:120]!r} has bits beyond its {expected} bytes") from None
