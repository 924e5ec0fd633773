"""Reading a JSON document of a known shape from outside."""

from typing import TypeVar

import msgspec

from cachesrv.errors import BadInput, TooLarge

T = TypeVar("T")


def decode(data: bytes | bytearray | memoryview, type_: type[T], *, what: str, limit: int | None = None) -> T:
    """The document as a `type_` of msgspec; `what` names it in messages, as "a realisation".

    Raises TooLarge beyond `limit` bytes, None where the caller has seen to that, and BadInput for what is no JSON, has
    another shape or nests without end. Keys that `type_` does not know are passed over.
    """
    if limit is not None and len(data) > limit:
        raise TooLarge(f"{what} of {len(data)} bytes exceeds the limit of {limit}")
    try:
        return msgspec.json.decode(data, type=type_)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what} cannot be read: {str(error)[:200]!r}") from None
