"""An entry of a netrc file, put there without touching the others.

It stands on one line, the first: what follows a `default` entry is never reached.
"""

from __future__ import annotations

import re
from itertools import pairwise

from cachesrv.errors import Conflict

LOGIN = "cachesrv"
"""The server looks at the password only; by this name we know our entries again."""


def line(host: str, password: str) -> str:
    """The entry."""
    return f"machine {host} login {LOGIN} password {password}"


def put(text: str, host: str, password: str) -> str:
    """The text with this password for this host; the same text when it is there already. Raises Conflict, which does
    not repeat a password, when somebody else's entry for the host has another one.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    own = re.compile(rf"\s*machine\s+{re.escape(host)}\s+login\s+{LOGIN}\s+password\s+\S+\s*").fullmatch
    others = [other for other in lines if not own(other)]
    passwords = _passwords(others, host)
    if passwords:
        if passwords[0] == password:
            return text
        raise Conflict(
            f"there is an entry for {host} with another password: remove it, or put the token into it by hand"
        )
    if [other for other in lines if own(other)] == [line(host, password)]:
        return text
    return "".join(f"{entry}\n" for entry in (line(host, password), *others))


def _passwords(lines: list[str], host: str) -> list[str]:
    """Of all entries for the host; an empty one where there is none."""
    words = [word for other in lines if not other.lstrip().startswith("#") for word in other.split()]
    pairs = enumerate(pairwise(words))
    begins = [number for number, pair in pairs if pair == ("machine", host)]
    return [_password(words[number + 2 :]) for number in begins]


def _password(words: list[str]) -> str:
    for key, value in zip(words[::2], words[1::2], strict=False):
        if key in {"machine", "default", "macdef"}:
            break
        if key == "password":
            return value
    return ""
