"""Names inside a store path, as a file system would understand them; and words for what is not there."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.listing import Directory, ListingNode, Regular, Symlink
from cachesrv.push.members import find, find_file, split

PATH = "/nix/store/00000000000000000000000000000000-x"
TREE = Directory(
    {
        "bin": Directory({"tool": Regular(3, executable=True), "alias": Symlink("./tool"), "up": Symlink("../etc")}),
        "etc": Directory({"conf": Regular(1), "self": Symlink(f"{PATH}/bin/alias"), "top": Symlink(PATH)}),
        "out": Symlink("/nix/store/11111111111111111111111111111111-y/z"),
        "beside": Symlink(f"{PATH}-2/etc"),
        "above": Symlink("../../etc"),
        "loop": Symlink("loop"),
        "dangling": Symlink("bin/none"),
    }
)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("", ""),
        ("bin/tool", "bin/tool"),
        ("/bin//./tool/", "bin/tool"),
        ("bin/alias", "bin/tool"),
        ("bin/up/conf", "etc/conf"),
        ("etc/self", "bin/tool"),
        ("etc/top/bin/up/self", "bin/tool"),
        ("bin/../etc/conf", "etc/conf"),
        ("bin/up/../bin/tool", "bin/tool"),
    ],
)
def test_links_are_followed_inside(asked: str, found: str) -> None:
    names, node = find(TREE, split(asked), PATH, follow=True)
    assert "/".join(names) == found
    assert node is find(TREE, split(found), PATH, follow=False)[1]


def test_a_link_at_the_end_is_followed_if_asked_for() -> None:
    assert find(TREE, ("bin", "alias"), PATH, follow=False) == (("bin", "alias"), Symlink("./tool"))
    assert find(TREE, ("bin", "up"), PATH, follow=False)[1] == Symlink("../etc")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("bin/none", f"there is no none in {PATH}/bin"),
        ("none/none", f"there is no none in {PATH}"),
        ("bin/up/none", f"there is no none in {PATH}/etc"),
        ("bin/tool/x", f"{PATH}/bin/tool is a file, there is no x in it"),
        ("dangling", f"there is no none in {PATH}/bin"),
        ("out", f"{PATH}/out is a link to /nix/store/11111111111111111111111111111111-y/z: ask for that"),
        ("out/x", f"{PATH}/out is a link to /nix/store/11111111111111111111111111111111-y/z: ask for that"),
        ("beside", f"{PATH}/beside is a link to {PATH}-2/etc: ask for that"),
        ("above", f"{PATH}/above leads out of {PATH}"),
        ("..", f"{PATH}/.. leads out of {PATH}"),
        ("loop", f"{PATH}/loop leads through more than 40 links"),
    ],
)
def test_what_is_not_there(asked: str, said: str) -> None:
    with pytest.raises(NotFound) as caught:
        find(TREE, split(asked), PATH, follow=True)
    assert str(caught.value) == said


def test_what_a_cache_says_is_fit_for_a_terminal() -> None:
    for target in ("/x\x1b[2J\ny", "x\x1b[2J\ny"):
        with pytest.raises(NotFound) as caught:
            find(Directory({"a": Symlink(target)}), ("a",), PATH, follow=True)
        assert str(caught.value).isprintable()


def test_a_directory_is_no_file() -> None:
    with pytest.raises(BadInput, match=f"{PATH}/etc is a directory"):
        find_file(TREE, ("bin", "up"), PATH)


def test_a_store_path_that_is_a_link() -> None:
    link = Symlink("/elsewhere")
    assert find(link, (), PATH, follow=False) == ((), link)
    for names in ((), ("x",)):
        with pytest.raises(NotFound, match="is a link to /elsewhere"):
            find(link, names, PATH, follow=True)
    with pytest.raises(NotFound, match="leads out"):
        find(Symlink("beside"), (), PATH, follow=True)


steps = st.sampled_from(("a", "b", "..", "."))
targets = st.lists(steps, min_size=1, max_size=3).map("/".join)
nodes: st.SearchStrategy[ListingNode] = st.recursive(
    st.just(Regular()) | st.builds(Symlink, targets),
    lambda inner: st.builds(Directory, st.dictionaries(st.sampled_from(("a", "b")), inner, max_size=2)),
    max_leaves=6,
)


def make(node: ListingNode, file: Path) -> None:
    if isinstance(node, Directory):
        file.mkdir()
        for name, child in node.entries.items():
            make(child, file / name)
    elif isinstance(node, Symlink):
        file.symlink_to(node.target)
    else:
        file.touch()


@given(
    st.dictionaries(st.sampled_from(("a", "b")), nodes, max_size=2), st.lists(st.sampled_from(("a", "b")), max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_a_file_system_finds_the_same(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, ListingNode], names: list[str]
) -> None:
    root = tmp_path_factory.mktemp("tree") / "x"
    make(Directory(entries), root)
    try:
        expected = os.path.realpath(root.joinpath(*names), strict=True)
    except OSError:
        expected = None
    inside = expected is not None and f"{expected}/".startswith(f"{root}/")
    try:
        found, _ = find(Directory(entries), names, str(root), follow=True)
    except NotFound:
        # a way that leaves the store path and comes back is one that only the system can go
        assert not inside or any(".." in str(link.readlink()) for link in root.rglob("*") if link.is_symlink())
    else:
        assert str(root.joinpath(*found)) == expected
