"""nix.conf as text: what a cache asks of its clients, put there without touching what else is in it.

    # >>> cachesrv https://cache.example.org/main
    extra-substituters = https://cache.example.org/main
    extra-trusted-public-keys = main-1:…
    netrc-file = /home/ann/.config/nix/netrc          (for a private cache)
    # <<< cachesrv https://cache.example.org/main

The block is ours and is replaced as a whole. Nix keeps trusted keys by their names and takes the first of equal
names, so that an older key that stands elsewhere would hide the new one: where it was written by hand for the same
cache it is replaced too, and otherwise it is a conflict.

Format: Nix, `src/libutil/config.cc`: `name = words`, `extra-name = words` to append, `#` begins a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, ConfigError, Conflict
from cachesrv.nix.signing import PublicKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SUBSTITUTERS = "substituters"
KEYS = "trusted-public-keys"
NETRC_FILE = "netrc-file"

_BEGIN, _END = "# >>> cachesrv ", "# <<< cachesrv "


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What clients of a cache have to set; `netrc_file` is absolute, None where nothing has to be set."""

    url: str
    keys: tuple[PublicKey, ...]
    netrc_file: str | None = None

    def lines(self) -> list[str]:
        """As nix.conf has them."""
        lines = [f"extra-{SUBSTITUTERS} = {self.url}"]
        if self.keys:
            lines.append(f"extra-{KEYS} = {' '.join(key.render() for key in self.keys)}")
        if self.netrc_file is not None:
            lines.append(f"{NETRC_FILE} = {self.netrc_file}")
        return lines


def words(lines: Iterable[str], name: str, default: Iterable[str] = ()) -> list[str]:
    """The value of a setting that is a list of words, as these lines leave it."""
    value = list(default)
    for line in lines:
        key, found = _parse(line)
        if key == name:
            value = found
        elif key == f"extra-{name}":
            value += found
    return value


def put(text: str, wanted: CacheSettings) -> str:
    """The text with these settings in force; the same text when they are already. Raises Conflict when another key of
    the same name is trusted for something else, ConfigError when our block is damaged.
    """
    lines = split(text)
    first, last = _block(lines, wanted.url)
    before, after = _renewed(lines[:first], lines, wanted), _renewed(lines[last:], lines, wanted)
    block = [f"{_BEGIN}{wanted.url}", *wanted.lines(), f"{_END}{wanted.url}"]
    new = [*before, *block, *after] if first < last else [*before, *after]
    if not in_force(new, wanted):  # there is no block, or what stands below takes it back
        others = [*before, *after]
        new = [*others, *([""] if others and others[-1].strip() else []), *block]
    return text if new == lines else _joined(new)


def split(text: str) -> list[str]:
    """The lines of a text file; what else Unicode calls a line break is none here."""
    return text.removesuffix("\n").split("\n") if text else []


def without_block(text: str, url: str) -> list[str]:
    """The lines that are not our block for this cache. Raises ConfigError as `put` does."""
    lines = split(text)
    first, last = _block(lines, url)
    return [*lines[:first], *lines[last:]]


def check_keys(lines: list[str], wanted: CacheSettings) -> None:
    """Raises Conflict when these lines trust another key under the name of one of ours."""
    _renewed(lines, [], wanted)


def in_force(lines: list[str], wanted: CacheSettings) -> bool:
    """Whether these lines say it all already."""
    keys = words(lines, KEYS)
    return (
        wanted.url in words(lines, SUBSTITUTERS)
        and all(key.render() in keys for key in wanted.keys)
        and (wanted.netrc_file is None or " ".join(words(lines, NETRC_FILE)) == wanted.netrc_file)
    )


def _block(lines: list[str], url: str) -> tuple[int, int]:
    """Where our block for this cache begins and ends (exclusive); twice the end of the lines when there is none."""
    stripped = [line.strip() for line in lines]
    begins, ends = stripped.count(f"{_BEGIN}{url}"), stripped.count(f"{_END}{url}")
    if not begins and not ends:
        return len(lines), len(lines)
    first = stripped.index(f"{_BEGIN}{url}") if begins else 0
    last = stripped.index(f"{_END}{url}") if ends else 0
    if (begins, ends) != (1, 1) or last < first:
        raise ConfigError(f"the lines from `{_BEGIN}{url}` to `{_END}{url}` are not whole: remove them by hand")
    return first, last + 1


def _renewed(lines: list[str], all_lines: list[str], wanted: CacheSettings) -> list[str]:
    """The lines with our keys in place of older ones that were written by hand for the same cache."""
    by_hand = wanted.url in words(_outside_blocks(all_lines), SUBSTITUTERS)
    new = []
    owner: str | None = None
    for line in lines:
        if line.strip().startswith(_BEGIN):
            owner = line.strip().removeprefix(_BEGIN)
        elif line.strip().startswith(_END):
            owner = None
        for key in wanted.keys:
            for word in _other_keys(line, key):
                if owner is not None or not by_hand:
                    raise Conflict(_conflict(key, word, owner))
                line = line.replace(word, key.render())  # noqa: PLW2901  the line as it is to be
        new.append(line)
    return new


def _conflict(key: PublicKey, word: str, owner: str | None) -> str:
    whose = f" for {owner}" if owner else ""
    return (
        f"another key called {key.name} is trusted already{whose}: {word}. Nix takes one of a name only: remove it"
        " if it is no longer used, or give one of the caches a key with another name (`cachesrv key generate`,"
        " signing_key_files)"
    )


def _outside_blocks(lines: Iterable[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        inside = inside or line.strip().startswith(_BEGIN)
        if not inside:
            yield line
        inside = inside and not line.strip().startswith(_END)


def _other_keys(line: str, key: PublicKey) -> list[str]:
    """Words of a line of trusted keys that have this key's name and are not this key."""
    name, found = _parse(line)
    if name.removeprefix("extra-") != KEYS:
        return []
    return [word for word in found if word.startswith(f"{key.name}:") and not _same(word, key)]


def _same(word: str, key: PublicKey) -> bool:
    try:
        return PublicKey.parse(word) == key
    except BadInput:
        return False


def _parse(line: str) -> tuple[str, list[str]]:
    """Name and words of a setting; an empty name for all other lines."""
    match = re.fullmatch(r"\s*([A-Za-z0-9-]+)\s*=(.*)", line.partition("#")[0])
    return (match[1], match[2].split()) if match else ("", [])


def _joined(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
