"""The configuration: the example says all there is, and every mistake is told at once and in words."""

import re
import tomllib
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachesrv.config import Cache, Config, Storage, Token, data_dir, load
from cachesrv.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"
DATA = Path("/data")
DIGEST = sha256(b"token").hexdigest()
SECTIONS = {field.name: field.type for field in msgspec.structs.fields(Config) if field.name != "data_dir"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachesrv.toml"


def mistakes_of(text: str, file: Path, environ: dict[str, str] | None = None) -> list[str]:
    """The lines of the error, without the name of the file."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, DATA, environ or {})
    return [line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()]


def struct_of(section: str) -> type[msgspec.Struct]:
    kind = SECTIONS[section]
    struct: type[msgspec.Struct] = getattr(kind, "__args__", (kind,))[0]
    return struct


def example_keys() -> dict[str, list[str]]:
    """The keys of the example by section, those in comments too."""
    keys: dict[str, list[str]] = {}
    for line in EXAMPLE.read_text().splitlines():
        if header := re.fullmatch(r"(?:# )?\[\[?(\w+)\]\]?", line):
            found = keys.setdefault(header[1], [])
        elif key := re.match(r"(?:# )?(\w+) = ", line):
            found.append(key[1])
    return keys


def test_example_loads_and_says_the_defaults() -> None:
    assert load(EXAMPLE, DATA, {}) == Config(DATA) == load(None, DATA, {})


def test_example_has_every_key_once_and_no_other() -> None:
    assert example_keys() == {
        section: [field.name for field in msgspec.structs.fields(struct_of(section))] for section in SECTIONS
    }


def test_example_comments_out_only_keys_without_a_value_and_tokens() -> None:
    document = tomllib.loads(EXAMPLE.read_text())
    stated = {
        (section, key) for section, table in document.items() for key in (table[0] if section == "cache" else table)
    }
    silent = {(section, key) for section, keys in example_keys().items() for key in keys} - stated
    none = {
        (section, field.name)
        for section in SECTIONS
        for field in msgspec.structs.fields(struct_of(section))
        if field.default is None or section in {"token", "upstream"}
    }
    assert silent == none


def test_commented_keys_of_the_example_are_right_too(file: Path) -> None:
    """What is commented out can be had by removing two characters."""
    text = re.sub(r"(?m)^# (\w+ = |\[\[(?:token|upstream)\]\])", r"\1", EXAMPLE.read_text())
    file.write_text(text.replace('kind = "filesystem"', 'kind = "s3"'))
    config = load(file, DATA, {})
    assert config.server.base_url == "https://cache.example.org"
    assert config.storage.path == "/srv/cachesrv/objects"
    assert config.cache[0].signing_key_files == ("/etc/cachesrv/cache.example.org-1.secret",)
    assert [token.name for token in config.token] == ["ci"]
    assert [upstream.name for upstream in config.upstream] == ["nixos"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ('"90"', 90),
        ("90", 90),
        ('"30 min"', 1800),
        ('"30m"', 1800),
        ('"2h"', 7200),
        ('"1 D"', 86400),
        ('"1 w"', 604800),
    ],
)
def test_durations_have_units(file: Path, value: str, seconds: int) -> None:
    file.write_text(f"[lookup]\nnegative_ttl = {value}\n[server]\nstall_timeout = {value}\nshutdown_timeout = {value}")
    config = load(file, DATA, {})
    assert (config.lookup.negative_ttl, config.server.stall_timeout, config.server.shutdown_timeout) == (seconds,) * 3


@pytest.mark.parametrize(
    ("value", "size"), [("0", 0), ('"10 GiB"', 10 * 2**30), ('"1kb"', 1000), ('"3TB"', 3 * 10**12), ('"7 b"', 7)]
)
def test_sizes_have_units(file: Path, value: str, size: int) -> None:
    file.write_text(f"[server]\nmax_nar_size = {value}")
    assert load(file, DATA, {}).server.max_nar_size == size


@pytest.mark.parametrize(
    ("section", "line", "expected"),
    [
        ("server", "max_nar_size = '10 parsecs'", "server.max_nar_size = '10 parsecs': expected a size in bytes"),
        ("server", "max_nar_size = -1", "server.max_nar_size = -1: expected a size in bytes"),
        ("server", f"max_nar_size = '{'9' * 5000}'", "server.max_nar_size = '999"),
        ("server", "max_nar_size = '999999999999 TiB'", "server.max_nar_size = '999999999999 TiB': expected a size"),
        ("server", "stall_timeout = '0 min'", "server.stall_timeout = '0 min': expected one second or more"),
        ("server", "shutdown_timeout = 1.5", "server.shutdown_timeout = 1.5: expected a time in seconds"),
        ("server", "workers = true", "server.workers = True: expected a whole number, 1 or more"),
        ("server", "workers = 1979-05-27", "server.workers = datetime.date(1979, 5, 27): expected a whole number"),
        ("server", "listen = '127.0.0.1:1'", "server.listen = '127.0.0.1:1': expected a list, each item \"HOST:PORT\""),
        ("server", "listen = ['here']", "server.listen = ['here']: expected a list, each item \"HOST:PORT\""),
        ("server", "listen = ['unix:here']", "server.listen = ['unix:here']: expected a list"),
        ("server", "base_url = 'cache.example.org'", "server.base_url = 'cache.example.org': expected a URL such as"),
        ("server", "store_dir = '/nix/../store'", "server.store_dir = '/nix/../store': expected an absolute path"),
        ("server", "store_dir = '/nix/store/'", "server.store_dir = '/nix/store/': expected an absolute path"),
        ("server", "tls_certificate = 'x'", "server: tls_certificate and tls_private_key belong together"),
        ("storage", "kind = 'tape'", "storage.kind = 'tape': expected \"filesystem\""),
        ("storage", "path = 1", "storage.path = 1: expected text in quotes"),
        ("storage", "kind = 's3'", 'storage.bucket: is required for kind = "s3"'),
        ("storage", "bucket = 'nix-cache'", 'storage.bucket = \'nix-cache\': kind = "filesystem" puts nothing'),
        ("storage", "kind = 's3'\nbucket = 'a/b'", "storage.bucket = 'a/b': expected the name of a bucket"),
        ("storage", "endpoint = 'https://h/b'", "storage.endpoint = 'https://h/b': expected a URL without a path"),
        ("storage", "endpoint = 'h:80'", "storage.endpoint = 'h:80': expected a URL without a path"),
        ("storage", "region = ''", "storage.region = '': expected a region such as"),
        ("storage", "prefix = '/x'", "storage.prefix = '/x': expected a folder such as"),
        ("storage", "addressing_style = 'x'", "storage.addressing_style = 'x': expected \"auto\" or \"path\" or"),
        ("delivery", "presign_seconds = '8 d'", "delivery.presign_seconds = '8 d': expected 60 seconds to 7 days"),
        ("index", "size = 1", "index.size: no such key; there are path, size_limit"),
        ("cache", "name = 'a/b'", "cache[0].name = 'a/b': expected 1 to 63 letters, digits, dashes and underscores"),
        ("cache", "name = 'nar'", "cache[0].name = 'nar': is taken by the paths of HTTP, choose another"),
        ("cache", "root = true", "cache[0].name: is required"),
        ("cache", "name = 'a'\nroot = 1", "cache[0].root = 1: expected true or false"),
        ("cache", "name = 'a'\nprefix = '../b'", "cache[0].prefix = '../b': expected a folder such as"),
        ("cache", "name = 'a'\nprefix = '/b'", "cache[0].prefix = '/b': expected a folder such as"),
        ("cache", "name = 'a'\npriority = 99999", "cache[0].priority = 99999: expected a whole number from"),
        ("cache", "name = 'a'\nreferences = 'some'", "cache[0].references = 'some': expected \"strict\" or"),
        ("cache", "name = 'a'\nretention_age = 'old'", "cache[0].retention_age = 'old': expected a time in seconds"),
        ("cache", "name = 'a'\nretention_size = 'big'", "cache[0].retention_size = 'big': expected a size in bytes"),
        ("cache", "name = 'a'\nauthority = 'bucket'\nretention_age = 1", "cache[0].retention_age = 1: what others"),
        ("collect", "lease = 0", "collect.lease = 0: expected one second or more"),
        ("collect", "interval = 'daily'", "collect.interval = 'daily': expected a time in seconds"),
        ("cache", "name = 'a'\ntrusted_keys = ['x:y']", "cache[0].trusted_keys = ['x:y']: expected a list, each"),
        ("token", f"name = ''\nsha256 = '{DIGEST}'", "token[0].name = '': expected 1 to 100 characters"),
        ("token", f"name = 'push-token'\nsha256 = '{DIGEST}'", "token: the name 'push-token' is used twice"),
        ("token", f"name = 'a'\nsha256 = '{DIGEST}'\npermissions = ['all']", "token[0].permissions = ['all']: "),
        ("token", f"name = 'a'\nsha256 = '{DIGEST}'\ncaches = ['mian']", "token[0].caches: no cache matches 'mian'"),
    ],
)  # fmt: skip
def test_a_mistake_names_key_value_and_what_was_expected(file: Path, section: str, line: str, expected: str) -> None:
    header = f"[[{section}]]" if section in {"cache", "token"} else f"[{section}]"
    (mistake,) = mistakes_of(f"{header}\n{line}\n", file)
    assert mistake.startswith(expected)
    assert len(mistake) < 400


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    """Wrong keys, wrong values, contradictions and variables, in sections that have nothing to do with each other."""
    text = """
        servers = 1
        [server]
        tls_certificate = "x"
        [storage]
        path = 1
        [[cache]]
        name = "a"
        root = true
        [[cache]]
        name = "a"
        root = true
        prefix = "a/nar"
        [[token]]
        name = "t"
        sha256 = "x"
        [[token]]
        """
    mistakes = mistakes_of(text, file, {"CACHESRV_INDEX__SIZE_LIMIT": "big", "CACHESRV_LOOKUP__TTL": "1"})
    beginnings = [re.split(r"[ :]", mistake)[0] for mistake in mistakes]
    assert sorted(beginnings) == [
        "$CACHESRV_INDEX__SIZE_LIMIT",
        "$CACHESRV_LOOKUP__TTL",
        "cache",
        "cache",
        "cache",
        "server",
        "servers",
        "storage.path",
        "token[0].sha256",
        "token[1].name",
        "token[1].sha256",
    ]


UPSTREAM = f"[[upstream]]\nname = 'u'\nurl = 'https://a.example'\npublic_keys = ['u:{'A' * 43}=']"


@pytest.mark.parametrize(
    ("text", "contradiction"),
    [
        ("[server]\nworkers = 'many'\ntls_certificate = 'x'", "server: tls_certificate and tls_private_key"),
        ("[server]\nworkers = 'many'\nstore_dir = 'x'", "server.store_dir = 'x': expected an absolute path"),
        ("[server]\ntls_certificate = 1\nstore_dir = 'x'", "server.store_dir = 'x': expected an absolute path"),
        ("[storage]\nreserve = 'much'\nkind = 's3'", "storage.bucket: is required"),
        ("[storage]\nbukket = 'abc'\nkind = 's3'", "storage.bucket: is required"),
        ("[[cache]]\nname = 'nar'\npublic = 1", "cache[0].name = 'nar': is taken"),
        ("[[cache]]\nname = 'a'\npublic = 1\n[[cache]]\nname = 'a'", "cache: the name 'a' is used twice"),
        ("[[cache]]\nname = 'a'\n[[cache]]\nname = 'b'\nprefix = 'a/b'\n[[cache]]\nname = '/'", "cache: the prefix"),
        ("[[cache]]\nname = 'a'\npublic = 1\npull_through = true", "cache[0].pull_through = true: needs at least"),
        ("[[cache]]\nname = 'a'\npublic = 1\nupstreams = ['b']", "cache[0].upstreams: no [[upstream]] is called 'b'"),
        ("[[cache]]\nname = 'a'\nupstreams = 1\nauthority = 'bucket'\nretention_age = 1", "cache[0].retention_age = 1"),
        ("[[cache]]\nname = 'a'\npublic = 1\npull_through = true\nupstreams = ['u']\n[delivery]\ndisk_cache_size = 0\n"
         + UPSTREAM,
         "cache[0].pull_through = true: needs a delivery"),
        (f"[[token]]\nname = 'a'\nsha256 = '{DIGEST}'\npermissions = 1\ncaches = ['x']", "token[0].caches: no cache"),
        (f"[[token]]\nsha256 = '{DIGEST}'\n[[token]]\nname = 'b'\nsha256 = '{DIGEST}'", "token: two of them have"),
    ],
)  # fmt: skip
def test_keys_are_compared_though_others_of_the_section_are_wrong(file: Path, text: str, contradiction: str) -> None:
    _wrong, told = mistakes_of(text, file)
    assert told.startswith(contradiction)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("[server]\ntls_certificate = 1\ntls_private_key = 'x'", "server.tls_certificate = 1: "),
        ("[storage]\nkind = 's4'\nbucket = 'abc'", "storage.kind = 's4': "),
        ("[storage]\nkind = 's3'\nbucket = 1", "storage.bucket = 1: "),
        ("[[cache]]\nname = 'a'\n[[cache]]\nname = 'b'\nprefix = '/'", "cache[1].prefix = '/': "),
        ("[[cache]]\nname = 'a'\nreferences = 'upstream'\nupstreams = 1", "cache[0].upstreams = 1: "),
        ("upstream = 1\n[[cache]]\nname = 'a'\nupstreams = ['u']", "upstream: expected an array of tables"),
        ("upstream = [1]\n[[cache]]\nname = 'a'\nupstreams = ['u']", "upstream[0]: expected a table"),
        (f"[[cache]]\nname = '/'\n[[token]]\nname = 'a'\nsha256 = '{DIGEST}'\ncaches = ['x']", "cache[0].name = '/': "),
    ],
)  # fmt: skip
def test_nothing_is_said_of_how_a_wrong_value_goes_with_others(file: Path, text: str, mistake: str) -> None:
    (told,) = mistakes_of(text, file)
    assert told.startswith(mistake)


@pytest.mark.parametrize("text", ["server = 1", "cache = 1", "[cache]\nname = 'a'", "cache = [1]", "[[server]]"])
def test_sections_of_the_wrong_shape(file: Path, text: str) -> None:
    (mistake,) = mistakes_of(text, file)
    assert re.match(r"(server|cache|cache\[0\]): expected (a table|an array of tables)", mistake)


def test_a_cache_may_be_all_of_the_storage_if_it_is_the_only_one(file: Path) -> None:
    file.write_text("[[cache]]\nname = 'a'\nprefix = ''\n[[cache]]\nname = 'b'\nprefix = ''\n")
    assert [cache.place for cache in load(file, DATA, {}).cache] == ["", ""]
    assert mistakes_of("[[cache]]\nname = 'a'\nprefix = ''\n[[cache]]\nname = 'b'\n", file) == [
        "cache: the prefix 'b' lies inside ''; expected the same prefix, or one beside it"
    ]


def test_prefixes_may_be_shared_but_not_nested(file: Path) -> None:
    shared = "[[cache]]\nname = 'a'\n[[cache]]\nname = 'b'\nprefix = '{}'\n"
    file.write_text(shared.format("a"))
    assert [cache.prefix for cache in load(file, DATA, {}).cache] == [None, "a"]
    (mistake,) = mistakes_of(shared.format("a/nar"), file)
    assert "'a/nar' lies inside 'a'" in mistake


def test_secrets_in_the_wrong_place_are_not_repeated(file: Path) -> None:
    """The token instead of its hash, and a password in a URL."""
    text = "[catalog]\nurl = 'mysql://u:geheim@h/d'\n[[token]]\nname = 'a'\nsha256 = 'csrv_geheim'\n"
    mistakes = mistakes_of(text, file)
    assert len(mistakes) == 2
    assert "geheim" not in "".join(mistakes)


def test_no_file_no_toml(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read: No such file"):
        load(tmp_path / "nowhere.toml", DATA, {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, DATA, {})
    file.write_text("[server\n")
    with pytest.raises(ConfigError, match=r"not TOML: .*line 1"):
        load(file, DATA, {})
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not TOML"):
        load(file, DATA, {})


@pytest.mark.parametrize("value", ["[" * 100_000, "{a=" * 100_000, "9" * 5000], ids=["arrays", "tables", "digits"])
def test_what_breaks_the_parser(file: Path, value: str) -> None:
    file.write_text(f"x = {value}")
    with pytest.raises(ConfigError, match="not TOML"):
        load(file, DATA, {})


def test_environment_wins_over_the_file(file: Path) -> None:
    file.write_text(f"[server]\nworkers = 2\n[[cache]]\nname = 'a'\n[[token]]\nname = 't'\nsha256 = '{DIGEST}'\n")
    environ = {
        "CACHESRV_SERVER__WORKERS": "3",
        "CACHESRV_SERVER__LISTEN": "0.0.0.0:80, unix:/run/s",
        "CACHESRV_SERVER__STALL_TIMEOUT": "2 min",
        "CACHESRV_STORAGE__PATH": "/srv/o",
        "CACHESRV_CACHE__0__PUBLIC": "false",
        "CACHESRV_CACHE__0__SIGNING_KEY_FILES": "/a,/b",
        "CACHESRV_CACHE__1__NAME": "b",
        "CACHESRV_TOKEN__0__PERMISSIONS": "pull,push",
        "CACHESRV_URL": "http://elsewhere",
        "CACHESRV_DATA_DIR": "/elsewhere",
        "UNRELATED__X": "1",
    }
    config = load(file, DATA, environ)
    assert config == Config(
        DATA,
        server=msgspec.structs.replace(
            Config(DATA).server, workers=3, listen=("0.0.0.0:80", "unix:/run/s"), stall_timeout=120
        ),
        storage=Storage(path="/srv/o"),
        cache=(Cache("a", public=False, signing_key_files=("/a", "/b")), Cache("b")),
        token=(Token("t", DIGEST, permissions=("pull", "push")),),
    )


def test_environment_changes_the_default_cache() -> None:
    config = load(None, DATA, {"CACHESRV_CACHE__0__PRIORITY": "30"})
    assert config.cache == (Cache("main", root=True, priority=30),)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CACHESRV_SERVER__WORKERS", "many", "server.workers = 'many': expected a whole number"),
        ("CACHESRV_SERVER__WORKERS", "9" * 5000, "server.workers = '999"),
        ("CACHESRV_CACHE__0__ROOT", "yes", "cache[0].root = 'yes': expected true or false"),
        ("CACHESRV_CACHE__2__NAME", "x", "there is no table cache[2]"),
        ("CACHESRV_SERVER__0__WORKERS", "1", "server: expected a table"),
        ("CACHESRV_CACHE__NAME", "x", "cache: expected an array of tables"),
        ("CACHESRV_SERVER__", "x", "expected CACHESRV_<SECTION>__<KEY>"),
        ("CACHESRV___WORKERS", "x", "expected CACHESRV_<SECTION>__<KEY>"),
        ("CACHESRV_SERVER__²__A", "x", "expected CACHESRV_<SECTION>__<KEY>"),
    ],
)
def test_mistakes_of_the_environment(name: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, DATA, {name: value})
    (line,) = str(caught.value).splitlines()
    assert line.removeprefix(f"${name}: ").startswith(expected)


names = st.sampled_from([*SECTIONS, "x"])
keys = st.sampled_from([field.name for section in SECTIONS for field in msgspec.structs.fields(struct_of(section))])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=8,
)


@given(
    st.dictionaries(names, values | st.lists(st.dictionaries(keys, values, max_size=3), max_size=2), max_size=3),
    st.dictionaries(
        st.builds("CACHESRV_{}__{}".format, names.map(str.upper), keys.map(str.upper) | st.text(max_size=5)),
        st.text(max_size=8),
        max_size=3,
    ),
)
@example({"cache": []}, {})
@example({"cache": [{"name": "a"}], "token": [None]}, {})
@settings(max_examples=150, deadline=None)
def test_any_document_is_a_configuration_or_a_mistake(document: dict[str, object], environ: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cachesrv.config._read", lambda _path: document)
        with suppress(ConfigError):
            assert isinstance(load(Path("x"), DATA, environ), Config)


def test_the_data_directory() -> None:
    home = {"HOME": "/h"}
    state = home | {"XDG_STATE_HOME": "/s"}
    unit = state | {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}
    stated = unit | {"CACHESRV_DATA_DIR": "/d"}
    found = [str(data_dir(None, environ)) for environ in (home, state, unit, stated)]
    assert found == ["/h/.local/state/cachesrv", "/s/cachesrv", "/var/lib/a", "/d"]
    assert str(data_dir("/given", stated)) == "/given"
    assert data_dir("relative", {}).is_absolute()
    with pytest.raises(ConfigError, match="--data-dir"):
        data_dir(None, {})
