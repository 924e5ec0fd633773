"""Which cache is pushed to, and which token goes there and nowhere else."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from cachesrv.errors import BadInput, ConfigError
from cachesrv.push import settings
from cachesrv.push.address import Address
from cachesrv.push.netrc import password_for
from cachesrv.push.settings import Given, find_settings
from cachesrv.push.token import TokenFile

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.push.level import Level


class Home:
    """A home directory, and the environment of who lives there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environ = {"HOME": str(directory)}

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def found(self, to: str | None = None, token_file: Path | None = None, data_dir: str | None = None) -> list[str]:
        """URL, token and its origin."""
        found = find_settings(Given(to, token_file, data_dir), self.environ)
        return [found.address.url, found.token.read() or "none", str(found.token)]

    def token(self, to: str | None = None, data_dir: str | None = None) -> str:
        return self.found(to, data_dir=data_dir)[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(settings, "SYSTEM_NETRC", tmp_path / "etc" / "netrc")
    return Home(tmp_path / "home")


CONFIG = ".config/cachesrv/client.toml"
PUSH_TOKEN = ".local/state/cachesrv/push-token"


@pytest.mark.parametrize(
    ("url", "base", "cache"),
    [
        ("http://127.0.0.1:5000/main", "http://127.0.0.1:5000", "main"),
        ("http://127.0.0.1:5000/main/", "http://127.0.0.1:5000", "main"),
        ("https://host/some/prefix/ci-1", "https://host/some/prefix", "ci-1"),
        ("http://[::1]:5000", "http://[::1]:5000", "main"),
        ("https://Host/", "https://Host", "main"),
        ("https://my_host.example.org./ci", "https://my_host.example.org.", "ci"),
        ("https://bücher.example/ci", "https://bücher.example", "ci"),
    ],
)
def test_an_address_is_a_server_and_a_cache(url: str, base: str, cache: str) -> None:
    address = Address.parse(url)

    assert (address.base, address.cache) == (base, cache)
    assert address.url == f"{base}/{cache}"
    assert address.api("missing") == f"{base}/api/v1/caches/{cache}/missing"
    assert address.nar("0abc") == f"{base}/{cache}/nar/0abc.nar.zst"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "main",
        "host:5000/main",
        "s3://bucket",
        "http://",
        "http:///main",
        "http://host:port/main",
        "http://host:0/main",
        "http://host:99999/main",
        "http://host/main?priority=1",
        "http://host/main#x",
        "http://host/ma%20in",
        "http://host/ma in",
        "http://host/../..",
        "http://host/main.narinfo",
        "http://[::1/main",
        "http://[::x]/main",
        "http://host/мир",
        "http://\udcff/main",
        "http://my host/main",
        "http://my%20host/main",
        "http://a..b/main",
        f"http://{'a' * 64}.example.org/main",
    ],
)
def test_other_texts_are_no_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(url)


@pytest.mark.parametrize("url", ["https://user:hunter2@host/main", "https://hunter2@host/main", "x://u:hunter2@host"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse(url)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("localhost", True),
        ("a.localhost", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_which_addresses_are_this_machine(host: str, *, loopback: bool) -> None:
    assert Address.parse(f"http://{host}:5000/main").is_loopback is loopback


def test_nothing_said_and_nothing_there_says_what_to_do(home: Home) -> None:
    with pytest.raises(ConfigError, match=r"--to for pushes.*set CACHESRV_URL"):
        home.found()


def test_the_command_line_wins_over_environment_over_configuration(home: Home) -> None:
    home.write(CONFIG, 'url = "http://config/main"')
    assert home.found()[0] == "http://config/main"

    home.environ["CACHESRV_URL"] = "http://environment/main"
    assert home.found()[0] == "http://environment/main"

    assert home.found("http://line/main")[0] == "http://line/main"


def test_tokens_in_their_order(home: Home) -> None:
    url = "http://127.0.0.1:5000/main"
    assert home.found(url) == [url, "none", "nowhere"]

    own = home.write(PUSH_TOKEN, "from-data-dir\n")
    assert home.found(url) == [url, "from-data-dir", str(own)]

    netrc = home.write(".netrc", "machine 127.0.0.1 login any password from-netrc")
    assert home.found(url) == [url, "from-netrc", f"{netrc} (machine 127.0.0.1)"]

    home.write(CONFIG, 'token_file = "token"')
    file = home.write(".config/cachesrv/token", "from-config\n")
    assert home.found(url) == [url, "from-config", str(file)]

    home.environ["CACHESRV_TOKEN"] = "from-environment"
    assert home.found(url) == [url, "from-environment", "$CACHESRV_TOKEN"]

    file = home.write("my-token", " from-line\n")
    assert home.found(url, file) == [url, "from-line", str(file)]


def test_with_a_push_token_here_the_url_can_be_left_out(home: Home) -> None:
    home.write(PUSH_TOKEN, "local")

    assert home.found()[:2] == ["http://127.0.0.1:5000/main", "local"]


def test_the_local_push_token_stays_on_this_machine(home: Home) -> None:
    home.write(PUSH_TOKEN, "local")

    assert home.token("https://cache.example.org/main") == "none"
    assert home.token("http://localhost:5000/main") == "local"


def test_a_push_token_that_its_server_makes_later_is_found(home: Home) -> None:
    token = find_settings(Given("http://127.0.0.1:5000/main"), home.environ).token
    assert token.read() is None

    home.write(PUSH_TOKEN, "local")

    assert token.read() == "local"
    assert str(token).endswith("push-token")


def test_a_data_directory_that_was_named_is_for_any_server(home: Home) -> None:
    home.write("data/push-token", "named")
    directory = str(home.directory / "data")

    assert home.token("https://cache.example.org/main", directory) == "named"
    home.environ["CACHESRV_DATA_DIR"] = directory
    assert home.token("https://cache.example.org/main") == "none"
    assert home.token("http://127.0.0.1/main") == "named"


def test_the_configurations_token_goes_to_the_configurations_server_only(home: Home) -> None:
    home.write(CONFIG, 'url = "https://cache.example.org/main"\ntoken_file = "token"')
    home.write(".config/cachesrv/token", "precious")

    assert home.token() == "precious"
    assert home.token("https://cache.example.org:443/other") == "precious"
    assert home.token("http://cache.example.org/main") == "none"
    assert home.token("https://evil.example.org/main") == "none"


def test_netrc_is_read_as_curl_and_nix_do(home: Home) -> None:
    text = """
# machine cache.example.org login a password comment
machine other login password password wrong account b
machine nothing login a
macdef init
machine cache.example.org password macro

# after an empty line, which the standard library's reader does not bear
machine cache.example.org
  login "a b"
  password p#ss"w\\o
machine quoted password "with \\"quote\\""  machine cache.example.org password second
default login x password fallback
machine late password late
"""
    home.environ["NETRC"] = str(home.write("netrc", text))

    assert home.token("https://Cache.example.org/main") == 'p#ss"w\\o'
    assert home.token("https://elsewhere.example.org/main") == "fallback"
    assert home.token("https://nothing/main") == "fallback"
    assert home.token("https://late/main") == "fallback"


def test_quoted_words_of_a_netrc_are_taken_apart() -> None:
    assert password_for("host", r'machine "host" password "a \"b\"\t\\"') == 'a "b"\t\\'


def test_a_bad_netrc_is_named_without_what_is_in_it(home: Home) -> None:
    home.write(".netrc", 'machine host login me\npassword "hunter2')

    with pytest.raises(ConfigError, match="netrc, line 2: a quote that does not end") as caught:
        home.found("http://host/main")

    assert "hunter2" not in str(caught.value)


@settings_of_hypothesis(max_examples=100, deadline=None)
@given(st.text(st.sampled_from('machinedefaultlogin pasword"\\\n# \t'), max_size=60))
def test_any_netrc_gives_a_password_or_bad_input(text: str) -> None:
    with suppress(BadInput):
        password_for("host", text)


@pytest.mark.parametrize("contents", ["", "two words", "line\nline", "schön", "\x00"])
def test_what_is_no_token_is_refused_and_not_repeated(home: Home, contents: str) -> None:
    file = home.write("token", contents)

    with pytest.raises(ConfigError, match=r"token.* holds is no token") as caught:
        home.found("http://host/main", file)

    assert not contents or contents not in str(caught.value)


def test_a_token_file_that_is_not_there_is_named(home: Home) -> None:
    with pytest.raises(ConfigError, match="gone cannot be read: No such file"):
        home.found("http://host/main", home.directory / "gone")


def test_a_token_that_is_renewed_is_read_again(home: Home) -> None:
    file = home.write("token", "old")
    source = TokenFile(file)
    assert source.read() == "old"

    file.write_text("new")
    assert source.read() == "new"


def test_tokens_do_not_show(home: Home) -> None:
    home.environ["CACHESRV_TOKEN"] = "hunter2"

    assert "hunter2" not in repr(find_settings(Given("http://host/main"), home.environ))


@pytest.mark.parametrize(
    ("text", "level"), [("", 3), ("level = 12", 12), ('level = "auto"\ntoken_file = "token"', "auto")]
)
def test_the_level_may_be_configured(home: Home, text: str, level: Level) -> None:
    home.write(".config/cachesrv/token", "secret")
    home.write(CONFIG, text)

    assert find_settings(Given("http://host/main"), home.environ).level == level


@pytest.mark.parametrize(
    "text", ["url = 1", "nonsense", "level = 0", "level = 20", 'level = "high"', 'token = "hunter2"', "\xff"]
)
def test_a_bad_client_configuration_is_named(home: Home, text: str) -> None:
    home.write(CONFIG, "")
    (home.directory / CONFIG).write_bytes(text.encode("latin-1"))

    with pytest.raises(ConfigError, match=r"client\.toml") as caught:
        home.found("http://host/main")

    assert "hunter2" not in str(caught.value)


def test_without_a_home_the_rest_still_works(home: Home) -> None:
    home.environ.clear()
    home.environ["CACHESRV_TOKEN"] = "secret"

    assert home.found("http://host/main")[:2] == ["http://host/main", "secret"]
