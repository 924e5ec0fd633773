"""Reads NARs while they stream through: checks that they are canonical and lists what they hold.

A NAR is made of strings, each a length (8 bytes, least byte first), the bytes, and zeros up to a multiple
of 8. `token(b"nix-archive-1")` comes first, then one node:

    ( type regular [executable ""] contents DATA )
    ( type symlink target TEXT )
    ( type directory {entry ( name NAME node NODE )} )

Source: Nix, `src/libutil/archive.cc` and the manual's `protocols/nix-archive`. Of the forms that some
Nix would read only the canonical one is taken, with the limits that Nix has had since 2.35, so that equal
trees have equal NARs.

What lies between the contents of two files is parsed as one unit by one regular expression: names and
targets hold no NUL, so a unit can be matched without knowing the lengths inside it; they are compared
afterwards. That costs a microsecond or two an entry, where going token by token costs tens.
"""

import re
from collections.abc import Callable

from cachesrv.errors import BadInput
from cachesrv.nix.listing import MAX_DEPTH, ListingBuilder, ListingNode, Regular

OnFile = Callable[[tuple[bytes, ...], int, bool], Callable[[memoryview], None] | None]
"""(names from the root, size in bytes, executable) -> what takes the contents, or None to pass them over."""


def token(data: bytes) -> bytes:
    """A string as NARs frame it."""
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


MAGIC = token(b"nix-archive-1")
CLOSE = token(b")")
ENTRY = token(b"entry") + token(b"(") + token(b"name")
NODE = token(b"node")
REGULAR = token(b"(") + token(b"type") + token(b"regular")
EXECUTABLE = token(b"executable") + token(b"")
CONTENTS = token(b"contents")
SYMLINK = token(b"(") + token(b"type") + token(b"symlink") + token(b"target")
DIRECTORY = token(b"(") + token(b"type") + token(b"directory")

_NODE_PATTERN = b"".join((
    b"(?:",
    re.escape(REGULAR) + b"(" + re.escape(EXECUTABLE) + b")?" + re.escape(CONTENTS) + rb"(.{8})|",
    re.escape(SYMLINK) + rb"(..)\0{6}([^\0]{1,4095})(\0{0,7})" + re.escape(CLOSE) + b"|",
    re.escape(DIRECTORY) + b")",
))  # fmt: skip
_match_root = re.compile(re.escape(MAGIC) + _NODE_PATTERN, re.DOTALL).match
_match_entry = re.compile(
    rb"([\0\x01)]*)" + re.escape(ENTRY) + rb"(.)\0{7}([^\0/]{1,255})(\0{0,7})" + re.escape(NODE) + _NODE_PATTERN,
    re.DOTALL,
).match

_LONGEST_UNIT = 8192  # the closing tokens of 64 levels, a name and a link's target make less than 7000
_LARGEST_FILE = 2**63 - 1  # what listings, databases and file systems can express
_LEAVE = CLOSE * 2  # ends a directory and the entry that it is
_AFTER_FILE = tuple(bytes(-size % 8) + CLOSE * 2 for size in range(8))
_RESERVED = frozenset((b".", b".."))


class NarReader:
    """Takes a NAR in pieces of any size and raises BadInput at the first that no canonical NAR has.

    Memory is that of the listing (see ListingBuilder for its limit, and for `any_names`) and a few KiB. With
    `listing=False`, or where the listing cannot be had, `root` stays None and all else is checked just the same.
    `on_file` is called for every regular file before its contents and may return a function that takes
    them, piece by piece; the pieces are views of what was fed and are valid during the call only. It is
    not called for empty contents.
    """

    def __init__(
        self,
        *,
        listing: bool = True,
        max_entries: int = 250_000,
        any_names: bool = False,
        on_file: OnFile | None = None,
    ) -> None:
        self.size = 0
        """Bytes taken so far."""
        self.root: ListingNode | None = None
        """What the NAR holds, once `finish` has found it whole."""
        self._listing = ListingBuilder(max_entries if listing else 0, any_names=any_names)
        self._on_file = on_file
        self._rest = b""  # the beginning of a unit that the last piece did not end
        self._left = 0  # bytes of a file's contents still to come
        self._sink: Callable[[memoryview], None] | None = None
        self._closing = b""  # what has to follow the last node before its next sibling
        self._last = b""  # name of the last entry of the innermost open directory
        self._outer: list[bytes] = []  # for each open directory, `_last` of the one around it
        self._begun = False
        self._ended = False
        self._spent = False

    def feed(self, data: bytes | memoryview) -> None:
        """Takes the next piece. After an error the reader takes nothing more and `finish` fails too."""
        if self._spent:
            raise BadInput("NAR was refused before")
        self._spent = True  # unless this piece turns out well
        view = memoryview(data)
        start, self.size = self.size, self.size + len(view)
        self._take(view, start)
        self._spent = False

    def finish(self) -> None:
        """Says that no more comes; raises BadInput unless the NAR is complete."""
        if self._spent:
            raise BadInput("NAR was refused before")
        if not self._begun:
            raise BadInput("not a NAR: it does not begin as one")
        if self._left:
            raise BadInput(f"NAR ends inside the contents of {self._where()}, {self._left} bytes early")
        if not self._ended:
            raise self._malformed(self.size - len(self._rest), "it ends too early, or no entry can begin so")
        self.root = self._listing.root

    def _take(self, view: memoryview, start: int) -> None:
        pos = self._resume(view, start) if self._rest else 0
        size = len(view)
        while pos < size:
            if self._left:
                end = min(pos + self._left, size)
                if self._sink is not None:
                    self._sink(view[pos:end])
                self._left -= end - pos
                pos = end
            else:
                end = self._unit(view, pos, start)
                if end == pos:
                    self._keep(bytes(view[pos : pos + _LONGEST_UNIT]), start + pos)
                    return
                pos = end

    def _resume(self, view: memoryview, start: int) -> int:
        """Ends the unit that the pieces before began; the position in `view` behind it."""
        had = len(self._rest)
        joined = self._rest + bytes(view[: _LONGEST_UNIT - had])
        self._rest = b""
        end = self._unit(memoryview(joined), 0, start - had)
        if end:
            return end - had
        self._keep(joined, start - had)
        return len(view)

    def _keep(self, rest: bytes, offset: int) -> None:
        if len(rest) == _LONGEST_UNIT:
            raise self._malformed(offset, "no entry or end can begin so" if self._begun else "not a NAR")
        self._rest = rest

    def _unit(self, view: memoryview, pos: int, start: int) -> int:
        """Parses the unit at `pos` of the piece that began at byte `start` of the NAR.

        Returns the position behind it, or `pos` if no whole unit is there.
        """
        if self._ended:
            raise BadInput(f"NAR has bytes behind its end at byte {start + pos}")
        if not self._begun:
            match = _match_root(view, pos)
            if match is None:
                return pos
            self._root(match, start)
            return match.end()
        match = _match_entry(view, pos) if self._outer else None
        if match is None:
            return self._end(view, pos)
        self._entry(match, start)
        return match.end()

    def _root(self, match: re.Match[bytes], start: int) -> None:
        self._begun = True
        self._node(b"", match.groups(), start + match.end())
        self._closing = self._closing[: -len(CLOSE)]  # the root is no entry that would have to be closed
        self._ended = not self._closing and not self._outer

    def _entry(self, match: re.Match[bytes], start: int) -> None:
        closing, length, name, padding, *node = match.groups()
        if closing != self._closing:
            self._leave(closing, start + match.start())
        if len(name) != length[0] or len(padding) != -len(name) % 8:
            raise self._malformed(start + match.start(3), "length or padding of a name is wrong")
        if name in _RESERVED:
            raise self._malformed(start + match.start(3), f"an entry is named {name!r}")
        if name <= self._last:
            raise self._malformed(start + match.start(3), f"{name!r} is not in order")
        if len(self._outer) >= MAX_DEPTH:
            raise self._malformed(start + match.start(3), f"deeper than {MAX_DEPTH} levels")
        self._last = name
        self._node(name, node, start + match.end())

    def _leave(self, closing: bytes, offset: int) -> None:
        levels = (len(closing) - len(self._closing)) // len(_LEAVE)
        if closing != self._closing + _LEAVE * levels or levels >= len(self._outer):
            raise self._malformed(offset, "padding or closing brackets are wrong")
        self._last = self._outer[-levels]
        del self._outer[-levels:]
        self._listing.leave(levels)

    def _end(self, view: memoryview, pos: int) -> int:
        levels = len(self._outer)
        end = self._closing + CLOSE * max(0, 2 * levels - 1)
        if view[pos : pos + len(end)] != end:
            return pos
        self._ended = True
        return pos + len(end)

    def _node(self, name: bytes, node: "tuple[bytes | None, ...] | list[bytes | None]", offset: int) -> None:
        """Takes what a node says up to byte `offset`; `node` is the groups of _NODE_PATTERN."""
        executable, size, length, target, padding = node
        if size is not None:
            self._file(name, int.from_bytes(size, "little"), executable is not None, offset)
        elif target is not None and length is not None and padding is not None:
            if len(target) != int.from_bytes(length, "little") or len(padding) != -len(target) % 8:
                raise self._malformed(offset, "length or padding of a link's target is wrong")
            self._closing = CLOSE
            self._listing.add_symlink(name, target)
        else:
            self._closing = b""
            self._outer.append(self._last)
            self._last = b""
            self._listing.enter(name)

    def _file(self, name: bytes, size: int, executable: bool, offset: int) -> None:
        if size > _LARGEST_FILE:
            raise self._malformed(offset, f"a file of {size} bytes cannot be")
        self._left = size
        self._closing = _AFTER_FILE[size % 8]
        self._listing.add(name, Regular(size, executable, offset))
        if self._on_file is not None:
            self._sink = self._on_file(self._names(), size, executable)

    def _names(self) -> tuple[bytes, ...]:
        return (*self._outer[1:], self._last) if self._outer else ()

    def _where(self) -> str:
        return repr(b"/".join(self._names()).decode(errors="replace"))

    def _malformed(self, offset: int, what: str) -> BadInput:
        place = f"at byte {offset}" + (f", after {self._where()}" if self._last else "")
        return BadInput(f"NAR is malformed {place}: {what}")
