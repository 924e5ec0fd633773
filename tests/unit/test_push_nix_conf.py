"""Settings put into nix.conf and netrc: in force afterwards, all else as it was."""

import netrc
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import ConfigError, Conflict
from cachesrv.nix.signing import PublicKey
from cachesrv.push import netrc_entry, nix_conf, nix_conf_files
from cachesrv.push.nix_conf import CacheSettings

URL = "https://cache.example.org/main"
KEY = PublicKey("main-1", b"k" * 32)
OLD = PublicKey("main-1", b"o" * 32)
WANTED = CacheSettings(URL, (KEY,))
PRIVATE = CacheSettings(URL, (KEY, PublicKey("main-2", b"2" * 32)), "/home/ann/with blank/netrc")
BLOCK = "\n".join([f"# >>> cachesrv {URL}", *WANTED.lines(), f"# <<< cachesrv {URL}", ""])


def show_config(folder: Path, text: str) -> dict[str, str]:
    """What the installed Nix takes from a nix.conf."""
    (folder / "nix").mkdir(exist_ok=True)
    (folder / "nix" / "nix.conf").write_text(text)
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "NIX_CONF_DIR": "/none"}
    command = ["nix", "--extra-experimental-features", "nix-command", "show-config"]
    shown = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    return dict(line.split(" = ", 1) for line in shown.splitlines() if " = " in line)


def test_nix_understands_it(tmp_path: Path) -> None:
    text = nix_conf.put("cores = 3\nextra-substituters = http://other", PRIVATE)
    shown = show_config(tmp_path, text)
    assert shown["cores"] == "3"
    assert shown["substituters"].split() == ["https://cache.nixos.org/", "http://other", URL]
    assert [key for key in shown["trusted-public-keys"].split() if key.startswith("main-")] == [
        key.render() for key in PRIVATE.keys
    ]
    assert shown["netrc-file"] == PRIVATE.netrc_file


def test_a_new_file_and_a_second_time() -> None:
    assert nix_conf.put("", WANTED) == BLOCK
    assert nix_conf.put(BLOCK, WANTED) == BLOCK


def test_what_is_there_stays_where_it_is() -> None:
    text = "# mine\ncores = 3\n\x0cextra-substituters = http://other # why\n\n"
    new = nix_conf.put(text, WANTED)
    assert new == text + BLOCK
    later = new + "max-jobs = 2\n"
    assert nix_conf.put(later, WANTED) == later
    assert nix_conf.put("no line end", WANTED) == "no line end\n\n" + BLOCK


def test_a_changed_key_replaces_the_block_in_its_place() -> None:
    text = nix_conf.put("cores = 3\n", CacheSettings(URL, (OLD,))) + "max-jobs = 2\n"
    assert nix_conf.put(text, WANTED) == f"cores = 3\n\n{BLOCK}max-jobs = 2\n"


def test_a_changed_key_replaces_the_one_that_was_copied_by_hand() -> None:
    """Nix would take the first of two keys with one name: the old one."""
    by_hand = f"extra-substituters = http://x {URL}\nextra-trusted-public-keys = x-1:AAAA {OLD} # mine\n"
    new = nix_conf.put(by_hand, WANTED)
    assert new == by_hand.replace(OLD.render(), KEY.render())
    assert nix_conf.put(new, WANTED) == new


def test_lines_that_were_copied_by_hand_are_enough() -> None:
    by_hand = "\n".join(WANTED.lines())
    assert nix_conf.put(by_hand, WANTED) == by_hand


def test_a_block_that_is_taken_back_further_down_moves_there(tmp_path: Path) -> None:
    text = nix_conf.put("", WANTED) + "substituters = http://other\n"
    new = nix_conf.put(text, WANTED)
    assert new == f"substituters = http://other\n\n{BLOCK}"
    assert URL in show_config(tmp_path, new)["substituters"]


@pytest.mark.parametrize(
    "text",
    [
        f"trusted-public-keys = {OLD}\n",
        "extra-trusted-public-keys = main-1:AAAA",
        nix_conf.put("", CacheSettings("http://other/main", (OLD,))),
        nix_conf.put("", CacheSettings("http://other/main", (OLD,))) + f"extra-substituters = {URL}\n",
    ],
)
def test_another_key_of_the_same_name_is_a_conflict(text: str) -> None:
    """Two servers that were started with nothing both call their key main-1."""
    with pytest.raises(Conflict, match="another key called main-1"):
        nix_conf.put(text, WANTED)


def test_the_same_key_at_two_urls_is_none() -> None:
    text = nix_conf.put("", CacheSettings("http://127.0.0.1:5000/main", (KEY,)))
    assert nix_conf.put(text, WANTED) == f"{text}\n{BLOCK}"


@pytest.mark.parametrize(
    "text",
    [f"# >>> cachesrv {URL}\n", f"# <<< cachesrv {URL}\n", BLOCK + BLOCK, "\n".join(reversed(BLOCK.splitlines()))],
)
def test_a_damaged_block_is_not_guessed_at(text: str) -> None:
    with pytest.raises(ConfigError, match="by hand"):
        nix_conf.put(text, WANTED)


lines = st.sampled_from(
    (
        "",
        "# a comment",
        "cores = 1",
        "substituters = http://a http://b",
        "extra-substituters = http://c",
        "trusted-public-keys =",
        f"extra-trusted-public-keys = x-1:AAAA {KEY}",
        "netrc-file = /etc/netrc",
        "!include other.conf",
        f"# >>> cachesrv {URL}/2",
        *WANTED.lines(),
    )
) | st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=20)


@given(st.lists(lines, max_size=8), st.sampled_from((WANTED, PRIVATE)), st.sampled_from((WANTED, PRIVATE)))
@settings(max_examples=150, deadline=None)
def test_put_holds_and_is_stable(before: list[str], first: CacheSettings, second: CacheSettings) -> None:
    text = "\n".join(before)
    for wanted in (first, second):
        text = nix_conf.put(text, wanted)
        assert nix_conf.in_force(nix_conf.split(text), wanted)
        assert nix_conf.put(text, wanted) == text
        kept = [line for line in nix_conf.without_block(text, URL) if line]
        assert kept == [line for line in before if line]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "machine h login cachesrv password T\n"),
        ("default login a password b", "machine h login cachesrv password T\ndefault login a password b\n"),
        ("machine h login cachesrv password OLD\n# c\n", "machine h login cachesrv password T\n# c\n"),
        ("machine g login cachesrv password T\n", None),
        ("machine h\n login ann\n password T\n", "machine h\n login ann\n password T\n"),
        ("# machine h\n", "machine h login cachesrv password T\n# machine h\n"),
    ],
)
def test_netrc(tmp_path: Path, before: str, after: str | None) -> None:
    new = netrc_entry.put(before, "h", "T")
    assert new == (after or "machine h login cachesrv password T\n" + before)
    assert netrc_entry.put(new, "h", "T") == new
    (tmp_path / "netrc").write_text(new)
    found = netrc.netrc(tmp_path / "netrc").authenticators("h")
    assert found is not None
    assert found[2] == "T"


@pytest.mark.parametrize("text", ["machine h login ann password other", "machine h\nmachine g password T"])
def test_somebody_elses_entry_is_left_alone(text: str) -> None:
    with pytest.raises(Conflict, match="for h with another password") as caught:
        netrc_entry.put(text, "h", "T")
    assert "other" not in str(caught.value).split()


def test_includes_are_read(tmp_path: Path) -> None:
    (tmp_path / "nix.conf").write_text("a = 1\ninclude sub/other.conf\n!include none.conf\nb = 2\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.conf").write_text("extra-trusted-users = ann # hi\ninclude other.conf\n")
    found = list(nix_conf_files.lines(tmp_path / "nix.conf"))
    assert found[0] == "a = 1"
    assert found[-1] == "b = 2"
    assert "ann" in nix_conf.words(found, "trusted-users", ["root"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", None),
        ("trusted-users = root ann\n", "ann"),
        ("extra-trusted-users = @wheel\n", "@wheel"),
        ("trusted-users = root ann\ntrusted-users = root # ann\n", None),
    ],
)
def test_words(text: str, name: str | None) -> None:
    expected = ["root", name] if name else ["root"]
    assert nix_conf.words(nix_conf.split(text), "trusted-users", ["root"]) == expected


def test_where_the_files_are(tmp_path: Path) -> None:
    home = {"HOME": "/h"}
    assert str(nix_conf_files.user_files(home).conf) == "/h/.config/nix/nix.conf"
    assert str(nix_conf_files.user_files(home | {"XDG_CONFIG_HOME": "/c"}).netrc) == "/c/nix/netrc"
    assert str(nix_conf_files.user_files(home | {"NIX_USER_CONF_FILES": "/a/x.conf:/b"}).conf) == "/a/x.conf"
    assert str(nix_conf_files.system_files(home).netrc) == "/etc/nix/netrc"
    assert str(nix_conf_files.system_files({"NIX_CONF_DIR": "/n"}).conf) == "/n/nix.conf"
    with pytest.raises(ConfigError, match="HOME"):
        nix_conf_files.user_files({})
