r"""Passwords in a netrc file, as curl reads it, and Nix with it.

    machine HOST login NAME password PASSWORD       any blanks and line breaks between the words
    default login NAME password PASSWORD            for hosts that no entry before it names
    # a comment, where a line begins
    macdef NAME                                     up to the next empty line, passed over

A word in double quotes may hold blanks, and `\n`, `\r`, `\t`, `\"`, `\\`. Other words are passed over.
The standard library's reader trips over a comment after an empty line, and puts passwords into its messages.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterator

_word = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^"\s]\S*))')
_escape = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def password_for(host: str, text: str) -> str | None:
    """The password of the first entry for this host, or of the `default` entry if that comes first.

    Raises BadInput, which names the line and nothing that stands there, for a quote that does not end.
    """
    matches = False
    words = _words(text)
    for word in words:
        if word == "machine":
            matches = next(words, "").lower() == host
        elif word == "default":
            matches = True
        elif word in ("login", "account"):
            next(words, None)
        elif word == "password" and (password := next(words, None)) is not None and matches:
            return password
    return None


def _words(text: str) -> Iterator[str]:
    in_macro = False
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            in_macro = False
        if in_macro or line.lstrip().startswith("#"):
            continue
        for word in _words_of(line, number):
            if word == "macdef":
                in_macro = True
                break
            yield word


def _words_of(line: str, number: int) -> Iterator[str]:
    line = line.rstrip()
    position = 0
    while position < len(line):
        match = _word.match(line, position)
        if match is None:
            raise BadInput(f"line {number}: a quote that does not end")
        position = match.end()
        quoted, plain = match.groups()
        yield plain if quoted is None else _escape.sub(lambda found: _ESCAPED.get(found[1], found[1]), quoted)
