"""The NAR reader against a plain parser, written here, that goes token by token over the whole archive."""

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput
from cachesrv.nix import narinfo
from cachesrv.nix.compression import decompressed
from cachesrv.nix.listing import Directory, ListingNode, Regular, Symlink, parse
from cachesrv.nix.nar import NarReader

VECTORS = Path(__file__).parent.parent / "vectors" / "cache"


@dataclass(frozen=True)
class File:
    contents: bytes
    executable: bool = False


@dataclass(frozen=True)
class Link:
    target: bytes


@dataclass(frozen=True)
class Dir:
    entries: "dict[bytes, File | Link | Dir]" = field(default_factory=dict)


Tree = File | Link | Dir


def words(tree: Tree) -> Iterator[bytes]:
    """The strings of a node, in order."""
    yield from (b"(", b"type")
    match tree:
        case File(contents, executable):
            yield b"regular"
            yield from (b"executable", b"") if executable else ()
            yield from (b"contents", contents)
        case Link(target):
            yield from (b"symlink", b"target", target)
        case Dir(entries):
            yield b"directory"
            for name in sorted(entries):
                yield from entry(name, entries[name])
    yield b")"


def entry(name: bytes, tree: Tree) -> Iterator[bytes]:
    yield from (b"entry", b"(", b"name", name, b"node", *words(tree), b")")


def framed(strings: list[bytes]) -> bytes:
    return b"".join(len(s).to_bytes(8, "little") + s + bytes(-len(s) % 8) for s in strings)


def encode(tree: Tree) -> bytes:
    return framed([b"nix-archive-1", *words(tree)])


class Malformed(Exception):
    pass


class PlainParser:
    """Takes canonical NARs and nothing else; a listing is made of Regular, Directory, Symlink by byte names."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def parse(self) -> Tree:
        self.expect(b"nix-archive-1")
        tree = self.node(0)
        self.require(self.pos == len(self.data))
        return tree

    def node(self, depth: int) -> Tree:
        self.require(depth < 64)
        self.expect(b"(", b"type")
        match self.word():
            case b"regular":
                return self.file()
            case b"symlink":
                self.expect(b"target")
                target = self.word()
                self.require(1 <= len(target) <= 4095 and b"\0" not in target)
                self.expect(b")")
                return Link(target)
            case b"directory":
                return self.directory(depth)
        raise Malformed

    def file(self) -> File:
        word = self.word()
        executable = word == b"executable"
        if executable:
            self.expect(b"")
            word = self.word()
        self.require(word == b"contents")
        contents = self.word()
        self.expect(b")")
        return File(contents, executable)

    def directory(self, depth: int) -> Dir:
        entries: dict[bytes, Tree] = {}
        last = b""
        while (word := self.word()) != b")":
            self.require(word == b"entry")
            self.expect(b"(", b"name")
            name = self.word()
            self.require(last < name and len(name) <= 255 and name not in (b".", b".."))
            self.require(b"/" not in name and b"\0" not in name)
            last = name
            self.expect(b"node")
            entries[name] = self.node(depth + 1)
            self.expect(b")")
        return Dir(entries)

    def expect(self, *wanted: bytes) -> None:
        for word in wanted:
            self.require(self.word() == word)

    def word(self) -> bytes:
        size = int.from_bytes(self.take(8), "little")
        word = self.take(size)
        self.require(not any(self.take(-size % 8)))
        return word

    def take(self, size: int) -> bytes:
        taken = self.data[self.pos : self.pos + size]
        self.require(len(taken) == size)
        self.pos += size
        return taken

    def require(self, holds: bool) -> None:
        if not holds:
            raise Malformed


def is_canonical(data: bytes) -> bool:
    try:
        PlainParser(data).parse()
    except Malformed:
        return False
    return True


def read(data: bytes, step: int = 1 << 20) -> NarReader:
    reader = NarReader()
    for start in range(0, len(data), step):
        reader.feed(memoryview(data)[start : start + step])
    reader.finish()
    return reader


def is_accepted(data: bytes, step: int = 1 << 20) -> bool:
    try:
        read(data, step)
    except BadInput:
        return False
    return True


def listing_of(tree: Tree, data: bytes) -> ListingNode:
    """The listing by a plain search: every file's contents in `trees` differ, so they are where they are found."""
    match tree:
        case File(contents, executable):
            offset = data.index(framed([b"contents", contents])) + 24
            return Regular(len(contents), executable, offset)
        case Link(target):
            return Symlink(target.decode())
        case Dir(entries):
            return Directory({name.decode(): listing_of(node, data) for name, node in entries.items()})


# Bytes that NARs themselves use between names, so that names can look like what surrounds them.
letters = st.sampled_from([b"\1", b"\4", b")", b"(", b"n", b"node", b"a", b"\x7f", "ü".encode(), b"."])
names = st.one_of(
    st.lists(letters, min_size=1, max_size=10).map(b"".join),
    st.sampled_from([b"x" * 255, b"12345678", b"1234567\4", b"1234567\1"]),
).filter(lambda name: name not in (b".", b".."))
targets = st.one_of(names, st.sampled_from([b"../a/b", b"t" * 4095, b"1234567\1", b"/"]))
files = st.builds(File, st.binary(max_size=40), st.booleans())
leaves = files | st.builds(Link, targets)
nodes = st.recursive(leaves, lambda inner: st.builds(Dir, st.dictionaries(names, inner, max_size=5)), max_leaves=12)


def numbered(tree: Tree, count: Iterator[int]) -> Tree:
    """The same with contents that differ from file to file."""
    match tree:
        case File(contents, executable):
            return File(b"%d:" % next(count) + contents, executable)
        case Dir(entries):
            return Dir({name: numbered(node, count) for name, node in entries.items()})
    return tree


trees = nodes.map(lambda tree: numbered(tree, iter(range(1000, 10000))))

SMALL = Dir(
    {
        b"bar": File(b"foo\n"),
        b"bin": Dir({b"none": Dir(), b"run": File(b"#!", True), b"to": Link(b"../bar")}),
        b"exactly8": File(b"12345678"),
        b"link": Link(b"xyzzy"),
        b"z": File(b""),
    }
)


def test_vector_of_a_directory() -> None:
    data = encode(Dir({b"bar": File(b"foo\n"), b"link": Link(b"xyzzy")}))
    assert len(data) == 480
    assert read(data).root == Directory({"bar": Regular(4, False, 232), "link": Symlink("xyzzy")})


def test_vector_of_a_file() -> None:
    data = encode(File(b"hello\n"))
    assert hashlib.sha256(data).hexdigest() == "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13"
    assert read(data).root == Regular(6, False, 96)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.narinfo")), ids=lambda path: path.name)
def test_nars_and_listings_that_nix_wrote(path: Path) -> None:
    info = narinfo.parse(path.read_bytes())
    nar = b"".join(decompressed(info.compression, [(VECTORS / info.url).read_bytes()]))
    reader = read(nar)
    assert reader.size == info.nar_size
    assert reader.root == parse(path.with_suffix(".ls").read_bytes())


@given(trees, st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_any_tree_in_any_pieces(tree: Tree, chance: random.Random) -> None:
    data = encode(tree)
    whole = read(data)
    assert whole.root == listing_of(tree, data)
    assert whole.size == len(data)
    assert read(data, 1).root == whole.root
    reader = NarReader()
    rest = data
    while rest:
        size = chance.choice((1, 2, 7, 8, 24, 100, 300))
        reader.feed(rest[:size])
        rest = rest[size:]
        reader.feed(b"")
    reader.finish()
    assert reader.root == whole.root


@given(trees)
@settings(max_examples=40, deadline=None)
def test_the_plain_parser_reads_what_was_encoded(tree: Tree) -> None:
    assert PlainParser(encode(tree)).parse() == tree


@given(trees)
@settings(max_examples=40, deadline=None)
def test_the_listing_is_no_part_of_the_check(tree: Tree) -> None:
    reader = NarReader(listing=False)
    reader.feed(encode(tree))
    reader.finish()
    assert reader.root is None


def test_every_truncation_is_refused() -> None:
    data = encode(SMALL)
    for size in range(len(data)):
        assert not is_accepted(data[:size])


@pytest.mark.parametrize("tree", [SMALL, File(b"hello", True), Link(b"12345678"), Dir()], ids=repr)
def test_every_change_of_one_byte(tree: Tree) -> None:
    """A change that leaves the NAR canonical (in contents, names, targets) is taken, all others are refused."""
    data = encode(tree)
    taken = 0
    for position in range(len(data)):
        for change in (1, 2, 4, 8, 0x20, 0x80, data[position]):
            mutant = bytearray(data)
            mutant[position] ^= change
            accepted = is_accepted(bytes(mutant))
            assert accepted == is_canonical(bytes(mutant)), (position, change)
            taken += accepted
    assert 0 < taken < len(data) * 7 or tree == Dir()


@pytest.mark.parametrize("tree", [SMALL, File(b"hello", True), Link(b"12345678"), Dir()], ids=repr)
def test_every_byte_left_out_or_put_in(tree: Tree) -> None:
    """Wrong amounts of padding are among these."""
    data = encode(tree)
    for position in range(len(data) + 1):
        for mutant in (
            data[:position] + data[position + 1 :],
            data[:position] + data[position + 8 :],
            data[:position] + b"\0" + data[position:],
            data[:position] + bytes(8) + data[position:],
        ):
            assert is_accepted(mutant) == is_canonical(mutant), position


@given(trees, st.data())
@settings(max_examples=150, deadline=None)
def test_strings_left_out_repeated_swapped_or_changed(tree: Tree, data: st.DataObject) -> None:
    strings = [b"nix-archive-1", *words(tree)]
    for _ in range(data.draw(st.integers(1, 2))):
        if not strings:
            break
        here = data.draw(st.integers(0, len(strings) - 1))
        there = data.draw(st.integers(0, len(strings) - 1))
        match data.draw(st.sampled_from(("leave out", "repeat", "swap", "change"))):
            case "leave out":
                del strings[here]
            case "repeat":
                strings.insert(here, strings[here])
            case "swap":
                strings[here], strings[there] = strings[there], strings[here]
            case _:
                strings[here] = data.draw(st.sampled_from([b"", b")", b".", b"..", b"a/b", b"a\0b", b"zz"]))
    nar = framed(strings)
    assert is_accepted(nar, data.draw(st.sampled_from((1, 50, 1 << 20)))) == is_canonical(nar)


@given(st.binary(max_size=300), st.booleans(), st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_value_or_bad_input(noise: bytes, begins_well: bool, step: int) -> None:
    data = encode(SMALL)[: len(noise)] + noise if begins_well else noise
    assert is_accepted(data, step) == is_canonical(data)


def nested(levels: int) -> Tree:
    tree: Tree = Dir()
    for _ in range(levels - 1):
        tree = Dir({b"d": tree})
    return tree


def test_64_levels_are_taken_and_65_are_not() -> None:
    assert is_accepted(encode(nested(64)))
    assert not is_accepted(encode(nested(65)))
    assert not is_canonical(encode(nested(65)))


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        (words(Dir({b"a": File(b""), b".": File(b"")})), "named"),
        (words(Dir({b"..": Link(b"x")})), "named"),
        (words(Dir({b"n" * 256: Link(b"x")})), "malformed"),
        (words(Dir({b"a/b": Link(b"x")})), "malformed"),
        (words(Dir({b"": Link(b"x")})), "malformed"),
        (words(Link(b"")), "not a NAR"),
        (words(Link(b"t" * 4096)), "not a NAR"),
        (words(Link(b"a\0b")), "not a NAR"),
        ([*words(Dir({b"b": Link(b"x")}))][:-1] + [*words(Dir({b"a": Link(b"x")}))][3:], "order"),
        ([*words(Dir({b"b": Link(b"x")}))][:-1] + [*words(Dir({b"b": Link(b"x")}))][3:], "order"),
        ([*words(File(b"")), b")"], "behind its end"),
        ([*words(Dir({b"d": Dir()})), b")"], "behind its end"),
        ([*words(Dir({b"d": File(b"")}))][:-2], "ends too early"),
        ([*words(Dir({b"a": Dir()})), b")", *entry(b"b", File(b""))], "closing brackets"),
        ([*words(Dir({b"a": File(b"")})), b")", *entry(b"b", File(b""))], "closing brackets"),
        ([*words(File(b"")), *entry(b"b", File(b""))], "behind its end"),
    ],
)
def test_the_error_says_what_is_wrong(strings: Iterator[bytes] | list[bytes], message: str) -> None:
    data = framed([b"nix-archive-1", *strings])
    assert not is_canonical(data)
    with pytest.raises(BadInput, match=message) as error:
        read(data)
    assert "\n" not in str(error.value)


def test_the_error_names_the_place() -> None:
    data = encode(Dir({b"bin": Dir({b"a": File(b"1"), b"b": File(b"2")}), b"c": File(b"3")}))
    with pytest.raises(BadInput, match=r"byte \d+, after 'bin/a': .*order"):
        read(data.replace(framed([b"b"]), framed([b"A"])))
    with pytest.raises(BadInput, match="inside the contents of 'bin/b', 1 bytes early"):
        read(data[: data.index(b"2")])


def test_a_reader_that_refused_stays_so() -> None:
    reader = NarReader()
    data = encode(File(b"x"))
    reader.feed(data)
    with pytest.raises(BadInput, match="behind"):
        reader.feed(b"x")
    for again in (reader.finish, lambda: reader.feed(b""), lambda: reader.feed(data)):
        with pytest.raises(BadInput, match="refused before"):
            again()


def test_a_file_larger_than_anything_can_hold() -> None:
    head = framed([b"nix-archive-1", b"(", b"type", b"regular", b"contents"])
    for size, message in ((2**63, "a file of 9223372036854775808 bytes"), (2**63 - 1, "ends inside the contents")):
        with pytest.raises(BadInput, match=message):
            read(head + size.to_bytes(8, "little"))


@given(trees, st.sampled_from((1, 5, 64, 1 << 20)))
@settings(max_examples=40, deadline=None)
def test_contents_go_to_who_asks_for_them(tree: Tree, step: int) -> None:
    wanted: dict[tuple[bytes, ...], tuple[bytearray, int, bool]] = {}

    def on_file(path: tuple[bytes, ...], size: int, executable: bool) -> Callable[[memoryview], None] | None:
        if size % 2:
            return None
        buffer = bytearray()
        wanted[path] = (buffer, size, executable)
        return buffer.extend

    data = encode(tree)
    reader = NarReader(listing=False, on_file=on_file)
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
    reader.finish()
    expected = {
        path: (bytearray(file.contents), len(file.contents), file.executable)
        for path, file in all_files(tree, ())
        if not len(file.contents) % 2
    }
    assert wanted == expected


def all_files(tree: Tree, path: tuple[bytes, ...]) -> Iterator[tuple[tuple[bytes, ...], File]]:
    if isinstance(tree, File):
        yield path, tree
    if isinstance(tree, Dir):
        for name, node in tree.entries.items():
            yield from all_files(node, (*path, name))


@pytest.mark.parametrize(
    "tree",
    [Dir({b"a": Dir({b"\xff": File(b"")}), b"b": File(b"")}), Dir({b"l": Link(b"\xff")}), Link(b"\xc3")],
    ids=repr,
)
def test_without_utf_8_there_is_no_listing(tree: Tree) -> None:
    assert read(encode(tree)).root is None
    assert not is_accepted(encode(tree)[:-1])


def test_any_names_are_taken_on_demand() -> None:
    reader = NarReader(any_names=True)
    reader.feed(encode(Dir({b"a\xff": File(b""), b"b": Link(b"\xc3")})))
    reader.finish()
    assert isinstance(reader.root, Directory)
    assert [*map(os.fsencode, reader.root.entries)] == [b"a\xff", b"b"]
    assert reader.root.entries["b"] == Symlink("\udcc3")


def test_beyond_the_limit_there_is_no_listing() -> None:
    data = encode(Dir({b"d": Dir({b"%d" % number: File(b"") for number in range(9)}), b"e": Link(b"x")}))
    for limit, there in ((12, True), (11, False), (1, False)):
        reader = NarReader(max_entries=limit)
        reader.feed(data)
        reader.finish()
        assert (reader.root is not None) is there
