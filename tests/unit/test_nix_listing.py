"""Listings as Nix writes them, and that anything else is refused and never more than refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.listing import (
    MAX_DEPTH,
    MAX_LISTING_SIZE,
    Directory,
    ListingBuilder,
    ListingNode,
    Regular,
    Symlink,
    find,
    parse,
    render,
)

VECTORS = Path(__file__).parent.parent / "vectors" / "cache"

counts = st.integers(0, 2**63 - 1)
texts = st.text(min_size=1, max_size=12)
names = texts.filter(lambda name: name not in (".", "..") and not set(name) & {"/", "\0"})
leaves = st.builds(Regular, counts, st.booleans(), counts) | st.builds(Symlink, texts)
nodes: st.SearchStrategy[ListingNode] = st.recursive(
    leaves, lambda inner: st.builds(Directory, st.dictionaries(names, inner, max_size=4)), max_leaves=12
)


def wrapped(node: object) -> bytes:
    return json.dumps({"version": 1, "root": node}).encode()


def test_rendered_as_current_nix_writes_it() -> None:
    """Keys in the order of nlohmann's maps, UTF-8 as it is, `executable` always said."""
    root = Directory(
        {
            "ü\x1f\x7f": Symlink('a"\\b/\n'),
            "bin": Directory({"run": Regular(3, True, 400), "data": Regular(0, False, 600)}),
            "empty": Directory({}),
        }
    )
    assert render(root).decode() == (
        '{"root":{"entries":{'
        '"bin":{"entries":{'
        '"data":{"executable":false,"narOffset":600,"size":0,"type":"regular"},'
        '"run":{"executable":true,"narOffset":400,"size":3,"type":"regular"}},"type":"directory"},'
        '"empty":{"entries":{},"type":"directory"},'
        '"ü\\u001f\x7f":{"target":"a\\"\\\\b/\\n","type":"symlink"}},'
        '"type":"directory"},"version":1}'
    )


@given(nodes)
@settings(max_examples=60, deadline=None)
def test_round_trip(root: ListingNode) -> None:
    data = render(root)
    assert parse(data) == root
    assert json.loads(data)["version"] == 1


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.ls")), ids=lambda path: path.name)
def test_listings_of_nix_2_8(path: Path) -> None:
    """They leave `executable` out where it is false; nothing else is lost."""
    rendered = json.loads(render(parse(path.read_bytes())))

    def without_defaults(node: dict[str, object]) -> dict[str, object]:
        return {key: value for key, value in node.items() if (key, value) != ("executable", False)}

    original = json.loads(path.read_bytes())
    assert json.loads(json.dumps(rendered), object_hook=without_defaults) == original


def test_all_but_the_type_may_be_missing() -> None:
    assert parse(b'{"root":{"type":"regular"}}') == Regular(0, False, 0)
    assert parse(b'{"root":{"zeal":[{}],"target":"x","type":"symlink"},"more":1}') == Symlink("x")
    assert parse(b' {"root" : {"type":"directory","entries":{}} } ') == Directory({})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"version":1}',
        b'{"version":2,"root":{"type":"regular"}}',
        b'{"version":"1","root":{"type":"regular"}}',
        wrapped({}),
        wrapped({"type": "pipe"}),
        wrapped({"type": "directory"}),
        wrapped({"type": "symlink"}),
        wrapped({"type": "regular", "size": -1}),
        wrapped({"type": "regular", "size": 2**63}),
        wrapped({"type": "regular", "size": 1e30}),
        wrapped({"type": "regular", "narOffset": "96"}),
        wrapped({"type": "regular", "executable": 1}),
        wrapped({"type": "symlink", "target": 1}),
        wrapped({"type": "regular"}) + b"x",
        wrapped({"type": "regular"})[:-1],
        b'{"root":{"type":"symlink","target":"\xff"}}',
        b'{"root":{"type":"symlink","target":"\\ud800"}}',
        b'{"root":{"type":"directory","entries":{"\\udc00x":{"type":"regular"}}}}',
        b'{"root":{"type":"directory","entries":{"\xff":{"type":"regular"}}}}',
        b'{"root":' + b'{"type":"directory","entries":{"a":' * 100_000,
        b'{"more":' + b"[" * 1_000_000,
    ],
    ids=lambda data: repr(data[:60]),
)
def test_what_is_no_listing(data: bytes) -> None:
    with pytest.raises(BadInput) as error:
        parse(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0"])
def test_names_that_no_nar_holds(name: str) -> None:
    inner = {"type": "directory", "entries": {name: {"type": "regular"}}}
    with pytest.raises(BadInput, match="entry named"):
        parse(wrapped({"type": "directory", "entries": {"ok": inner}}))


def deep(levels: int) -> ListingNode:
    root: ListingNode = Regular(1, False, 96)
    for _ in range(levels - 1):
        root = Directory({"d": root})
    return root


def test_depth_and_size_have_limits() -> None:
    assert parse(render(deep(MAX_DEPTH))) == deep(MAX_DEPTH)
    with pytest.raises(BadInput, match="deeper"):
        parse(render(deep(MAX_DEPTH + 1)))
    with pytest.raises(TooLarge):
        parse(bytes(MAX_LISTING_SIZE + 1))


@given(st.binary(max_size=60), nodes, st.integers(0, 200), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_value_or_bad_input(noise: bytes, root: ListingNode, position: int, dropped: int) -> None:
    data = render(root)
    for mutant in (noise, data[:position] + noise + data[position + dropped :]):
        try:
            node = parse(mutant)
        except BadInput:
            continue
        assert parse(render(node)) == node


def test_find() -> None:
    run = Regular(3, True, 400)
    root = Directory({"bin": Directory({"run": run, "..x": Symlink("run")}), "to-bin": Symlink("bin")})
    assert find(root, "") is root
    assert find(root, "/") is root
    assert find(root, "bin/run") is run
    assert find(root, "/bin//run/") is run
    assert find(root, "bin/..x") == Symlink("run")
    for missing in ("run", "bin/run/x", "to-bin/run", "bin/..", ".", "bin/ru", "entries"):
        assert find(root, missing) is None
    assert find(run, "") is run
    assert find(run, "x") is None


def test_a_builder_follows_the_order_of_a_nar() -> None:
    builder = ListingBuilder(10)
    builder.enter(b"")
    builder.enter(b"a")
    builder.enter(b"b")
    builder.add(b"f", Regular(1, False, 96))
    builder.leave(2)
    builder.add_symlink(b"z", b"a")
    inner = Directory({"b": Directory({"f": Regular(1, False, 96)})})
    assert builder.root == Directory({"a": inner, "z": Symlink("a")})


def test_long_texts_count_for_more_than_one_entry() -> None:
    def root_with(*targets: bytes) -> ListingNode | None:
        builder = ListingBuilder(10)
        builder.enter(b"")
        for number, target in enumerate(targets):
            builder.add_symlink(b"%d" % number, target)
        builder.leave(1)
        builder.enter(b"later")
        return builder.root

    assert root_with(*[b"t"] * 8) is not None
    assert root_with(*[b"t"] * 10) is None
    assert root_with(b"t" * 64 * 7) is not None
    assert root_with(b"t" * 64 * 9) is None
