"""The configuration: TOML and environment to frozen structs. Builds nothing, opens nothing but the file.

Every key stands in `config.example.toml` with its default and why. Unknown keys are refused, and all mistakes are
reported at once. Any key can come from the environment, as `CACHESRV_<SECTION>__<KEY>`; the tables of an array are
counted: `CACHESRV_CACHE__0__PRIORITY=30` (the first cache, also where no file names one). Environment wins over file;
lists are written with commas.

Sizes are bytes or "10 GiB"; durations are seconds or "30 min". Secrets come by file only.
"""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatchcase
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import msgspec

from cachesrv.errors import BadInput, ConfigError
from cachesrv.nix.store_path import check_store_dir

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_LARGEST = 2**63 - 1
_SIZE = 'a size in bytes, or with a unit, as "10 GiB"'
_DURATION = 'a time in seconds, or with a unit, as "30 min"'
_FOLDER = "[0-9A-Za-z_-][0-9A-Za-z_.-]{0,100}"

# Descriptions end the sentence "expected …"; what is secret is not repeated in messages.
Size = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST, title="size", description=_SIZE)]
PartSize = Annotated[int, msgspec.Meta(ge=2**20, le=2**30, title="size", description='a size from "1 MiB" to "1 GiB"')]
Duration = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST, title="duration", description=_DURATION)]
PositiveDuration = Annotated[
    int, msgspec.Meta(ge=1, le=_LARGEST, title="duration", description='one second or more, as 60 or "30 min"')
]
PresignSeconds = Annotated[
    int, msgspec.Meta(ge=60, le=604_800, title="duration", description='60 seconds to 7 days, as 3600 or "1 h"')
]
Positive = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST, description="a whole number, 1 or more")]
Priority = Annotated[int, msgspec.Meta(ge=0, le=10_000, description="a whole number from 0 to 10000")]
Listen = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A(unix:/.+|((\[[^\]]+\]|[^:\[\]]*):)?[0-9]{1,5})\Z",
        description='"HOST:PORT", "[IPv6]:PORT" or "unix:/PATH"',
    ),
]
Url = Annotated[
    str,
    msgspec.Meta(pattern=r"\Ahttps?://[!-~]+\Z", description='a URL such as "https://cache.example.org"'),
]
UpstreamUrl = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A(https?://[!\"$->@-~]+|s3://[!-~]+)\Z",
        description='a URL such as "https://cache.example.org" or "s3://bucket?region=eu-central-1"',
    ),
]
CatalogUrl = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\Asqlite:///.+",
        description='"sqlite:///" and the path of a file, as "sqlite:////srv/catalog.sqlite"',
        extra={"secret": True},
    ),
]
CacheName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A[0-9A-Za-z][0-9A-Za-z_-]{0,62}\Z",
        description="1 to 63 letters, digits, dashes and underscores, the first a letter or digit",
    ),
]
Prefix = Annotated[
    str,
    msgspec.Meta(pattern=rf"\A{_FOLDER}(/{_FOLDER}){{0,4}}\Z", description='a folder such as "main" or "team/main"'),
]
PlaceOfCache = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"\A({_FOLDER}(/{_FOLDER}){{0,4}})?\Z",
        description='a folder such as "main" or "team/main", or "" for a storage with this one cache',
    ),
]
Bucket = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A[0-9A-Za-z][0-9A-Za-z._-]{1,61}[0-9A-Za-z]\Z",
        description="the name of a bucket, 3 to 63 letters, digits, dots and dashes",
    ),
]
Region = Annotated[
    str, msgspec.Meta(pattern=r"\A[0-9A-Za-z][0-9A-Za-z_-]{0,62}\Z", description='a region such as "eu-central-1"')
]
Endpoint = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\Ahttps?://[^/?#@\s]+/?\Z", description='a URL without a path, such as "https://s3.example.org"'
    ),
]
PublicKeyText = Annotated[
    str,
    msgspec.Meta(pattern=r"\A[!-9;-~]{1,255}:[0-9A-Za-z+/]{43}=\Z", description='a public key, "<name>:<base64>"'),
]
TokenName = Annotated[
    str, msgspec.Meta(pattern=r"\A[!-~]([ -~]{0,98}[!-~])?\Z", description="1 to 100 characters of printable ASCII")
]
Sha256 = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A[0-9a-f]{64}\Z",
        description="the sha256 of a token, 64 hexadecimal digits, never the token itself",
        extra={"secret": True},
    ),
]
Permission = Literal["pull", "push", "delete", "admin"]

RESERVED_NAMES = frozenset({"api", "health", "metrics", "nar", "log", "realisations", "build-trace-v2", "debuginfo"})
"""Names that no cache may have: the paths of HTTP would be ambiguous."""

_UNITS = {
    "size": {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    | {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    "duration": {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 604800},
}


class Server(msgspec.Struct, frozen=True):
    """How the server listens."""

    listen: tuple[Listen, ...] = ("127.0.0.1:5000",)
    workers: Positive = 1
    base_url: Url | None = None
    store_dir: str = "/nix/store"
    tls_certificate: str | None = None
    tls_private_key: str | None = None
    max_nar_size: Size = 0
    stall_timeout: PositiveDuration = 60
    shutdown_timeout: Duration = 60


class Storage(msgspec.Struct, frozen=True):
    """Where the objects lie."""

    kind: Literal["filesystem", "s3"] = "filesystem"
    path: str | None = None
    bucket: Bucket | None = None
    prefix: Prefix | None = None
    region: Region | None = None
    endpoint: Endpoint | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    reserve: Size = 64 * 2**20


class Catalog(msgspec.Struct, frozen=True):
    """The SQL database."""

    url: CatalogUrl | None = None
    pool_size: Positive = 5


class Index(msgspec.Struct, frozen=True):
    """The memory-mapped index."""

    path: str | None = None
    size_limit: Size = 64 * 2**30


class Lookup(msgspec.Struct, frozen=True):
    """What is remembered of paths that are not there."""

    negative_ttl: PositiveDuration = 3600
    negative_limit: Positive = 1_000_000
    timeout: PositiveDuration = 5


class Delivery(msgspec.Struct, frozen=True):
    """How NARs reach clients that do not lie in files of this host."""

    mode: Literal["redirect", "proxy"] = "redirect"
    presign_seconds: PresignSeconds = 3600
    disk_cache_path: str | None = None
    disk_cache_size: Size = 10 * 2**30


class Uploads(msgspec.Struct, frozen=True):
    """How large NARs come in."""

    part_size: PartSize = 32 * 2**20
    direct: bool = True
    keep: PositiveDuration = 3 * 86400
    limit_size: Size = 256 * 2**30
    limit_count: Positive = 10_000


class Collect(msgspec.Struct, frozen=True):
    """When garbage is collected, and how long things stay that a cache keeps no longer."""

    interval: Duration = 86_400
    nar_grace: Duration = 30 * 86_400
    lease: PositiveDuration = 86_400
    history: Duration = 365 * 86_400


class Verify(msgspec.Struct, frozen=True):
    """Whether the server looks from time to time that everything is there and whole."""

    interval: Duration = 0
    contents: bool = True
    rate: Size = 20 * 2**20


class Cache(msgspec.Struct, frozen=True):
    """One binary cache."""

    name: CacheName
    prefix: PlaceOfCache | None = None
    root: bool = False
    public: bool = True
    priority: Priority = 40
    want_mass_query: bool = True
    signing_key_files: tuple[str, ...] | None = None
    authority: Literal["catalog", "bucket"] = "catalog"
    references: Literal["strict", "upstream", "any"] = "strict"
    trusted_keys: tuple[PublicKeyText, ...] = ()
    upstreams: tuple[CacheName, ...] = ()
    pull_through: bool = False
    retention_age: Duration = 0
    retention_size: Size = 0

    @property
    def place(self) -> str:
        """The folder of its objects in the storage; empty where that holds nothing else."""
        return self.name if self.prefix is None else self.prefix


class Upstream(msgspec.Struct, frozen=True):
    """A cache of somebody else's."""

    name: CacheName
    url: UpstreamUrl
    public_keys: tuple[PublicKeyText, ...]
    timeout: PositiveDuration = 10


class Token(msgspec.Struct, frozen=True):
    """Who may do what; the token itself is known to its holder only."""

    name: TokenName
    sha256: Sha256
    caches: tuple[str, ...] = ("*",)
    permissions: tuple[Permission, ...] = ("pull",)


class Config(msgspec.Struct, frozen=True):
    """The whole configuration; `data_dir` is given on the command line or by the environment, not in the file."""

    data_dir: Path
    server: Server = Server()
    storage: Storage = Storage()
    catalog: Catalog = Catalog()
    index: Index = Index()
    lookup: Lookup = Lookup()
    delivery: Delivery = Delivery()
    uploads: Uploads = Uploads()
    collect: Collect = Collect()
    verify: Verify = Verify()
    cache: tuple[Cache, ...] = (Cache(name="main", root=True),)
    upstream: tuple[Upstream, ...] = ()
    token: tuple[Token, ...] = ()

    def changed(self, *, listen: tuple[str, ...] | None, workers: int | None) -> Config:
        """The same with what the command line says; None leaves it as it is."""
        given = {key: value for key, value in {"listen": listen, "workers": workers}.items() if value is not None}
        return msgspec.structs.replace(self, server=msgspec.structs.replace(self.server, **given))


def data_dir(given: str | None, environ: Mapping[str, str]) -> Path:
    """The data directory: given, `$CACHESRV_DATA_DIR`, `$STATE_DIRECTORY`, `$XDG_STATE_HOME/cachesrv`, or
    `~/.local/state/cachesrv`.
    """
    if chosen := given or environ.get("CACHESRV_DATA_DIR") or environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(chosen).absolute()
    if state := environ.get("XDG_STATE_HOME"):
        return Path(state) / "cachesrv"
    if home := environ.get("HOME"):
        return Path(home) / ".local/state/cachesrv"
    raise ConfigError("no data directory: give --data-dir, or set $CACHESRV_DATA_DIR or $HOME")


def load(path: Path | None, directory: Path, environ: Mapping[str, str]) -> Config:
    """The configuration from a file (or from nothing) and the environment. Raises ConfigError with all mistakes, one a
    line: the key, the value and what was expected.
    """
    document = _read(path) if path else {}
    mistakes: list[str] = []
    variables = _overlay_environment(document, environ, mistakes)
    sections = {field.name: field for field in msgspec.structs.fields(Config) if field.name != "data_dir"}
    values: dict[str, Any] = {name: field.default for name, field in sections.items()}
    wrong = _WrongKeys()
    for key, value in document.items():
        if key in sections:
            values[key] = _section(sections[key].type, value, key, mistakes, wrong)
        else:
            mistakes.append(f"{key}: no such section; there are {', '.join(sections)}")
    mistakes += _contradictions(values, wrong)
    if not mistakes:
        return Config(data_dir=directory, **values)
    raise ConfigError("\n".join(_with_source(mistake, path, variables) for mistake in mistakes))


def _with_source(mistake: str, path: Path | None, variables: Mapping[str, str]) -> str:
    source = variables.get(re.split("[ :]", mistake, maxsplit=1)[0], path)
    return f"{source}: {mistake}" if source and not mistake.startswith("$") else mistake


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # Most are those of tomllib; numbers of thousands of digits and the deepest of arrays break it.
        raise ConfigError(f"{path}: not TOML: {error}") from error


class _WrongKeys:
    """The keys whose values cannot be used: nothing is said of how these go with others."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def add(self, where: str, keys: Iterable[str]) -> None:
        """Keys of a table such as "storage" or "cache[2]"."""
        section = where.partition("[")[0]
        self._keys.update(f"{place}.{key}" for place in (where, section) for key in keys)

    def without(self, where: str, *keys: str) -> bool:
        """Whether all these are right in a table; in all tables of the array, when that is named without a number."""
        return self._keys.isdisjoint(f"{where}.{key}" for key in keys)


def _section(kind: Any, value: Any, where: str, mistakes: list[str], wrong: _WrongKeys) -> Any:
    """A struct, or a list of them, from a table or an array of tables; what is wrong in them is blank."""
    if getattr(kind, "__origin__", None) is not tuple:
        return _struct(kind, value, where, mistakes, wrong)
    item = kind.__args__[0]
    if not isinstance(value, list):
        mistakes.append(f"{where}: expected an array of tables, written [[{where}]]")
        return (_blank(item, f"{where}[0]", {}, wrong),)
    return tuple(_struct(item, table, f"{where}[{number}]", mistakes, wrong) for number, table in enumerate(value))


def _struct(kind: type[msgspec.Struct], table: Any, where: str, mistakes: list[str], wrong: _WrongKeys) -> Any:
    if not isinstance(table, dict):
        mistakes.append(f"{where}: expected a table, written [{where.partition('[')[0]}] with its keys below")
        return _blank(kind, where, {}, wrong)
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    values = {name: field.default for name, field in known.items() if not field.required and name not in table}
    for key, value in table.items():
        if key not in known:
            mistakes.append(f"{where}.{key}: no such key; there are {', '.join(known)}")
            continue
        try:
            values[key] = _value(known[key].type, value)
        except (msgspec.ValidationError, ValueError):
            mistakes.append(f"{where}.{key} = {_shown(known[key].type, value)}: expected {_expected(known[key].type)}")
    mistakes += [f"{where}.{name}: is required" for name, f in known.items() if f.required and name not in table]
    return _blank(kind, where, values, wrong)


def _blank(kind: type[msgspec.Struct], where: str, values: Mapping[str, Any], wrong: _WrongKeys) -> Any:
    """A struct with the values that are right, and None for all others."""
    missing = [field.name for field in msgspec.structs.fields(kind) if field.name not in values]
    wrong.add(where, missing)
    return kind(**values, **dict.fromkeys(missing))


def _value(kind: Any, value: Any) -> Any:
    for meta in _metas(kind):
        if meta.title in _UNITS and isinstance(value, str):
            return msgspec.convert(with_unit(value, meta.title), kind)
    return msgspec.convert(value, kind)


def with_unit(text: str, measure: str) -> int:
    """Bytes of a "size" such as "10 GiB", or seconds of a "duration" such as "30 min". Raises ValueError."""
    units = _UNITS[measure]
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in units:
        raise ValueError(f"not a {measure}: {text[:100]!r}")
    return int(match[1]) * units[match[2].lower()]


def _metas(kind: Any) -> tuple[msgspec.Meta, ...]:
    return getattr(kind, "__metadata__", ())


def _expected(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if metas := _metas(kind):
        return metas[0].description or _expected(arguments[0])
    if origin is tuple:
        return f"a list, each item {_expected(arguments[0])}"
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if arguments:  # of a union with None, which no file can say
        return _expected(arguments[0])
    return {bool: "true or false", str: "text in quotes"}[kind]


def _shown(kind: Any, value: Any) -> str:
    """The value as a message may repeat it."""
    secret = any((meta.extra or {}).get("secret") for part in (kind, *get_args(kind)) for meta in _metas(part))
    return "…" if secret else repr(value)[:200]


def _overlay_environment(document: dict[str, Any], environ: Mapping[str, str], mistakes: list[str]) -> dict[str, str]:
    """Puts the values of variables into the document; which variable each key has its value from."""
    variables: dict[str, str] = {}
    for name in sorted(environ):
        match = re.fullmatch(r"CACHESRV_(?P<section>[A-Z]+)(?:__(?P<number>[0-9]{1,4}))?__(?P<key>[0-9A-Z_]+)", name)
        if not match:
            if name.startswith("CACHESRV_") and "__" in name:
                mistakes.append(f"${name}: expected CACHESRV_<SECTION>__<KEY>, or CACHESRV_<SECTION>__<NUMBER>__<KEY>")
            continue
        section, number, key = match["section"].lower(), match["number"], match["key"].lower()
        where = section if number is None else f"{section}[{int(number)}]"
        table = _table(document, section, number)
        if table is None:
            mistakes.append(f"${name}: there is no table {where} to put it into")
            continue
        table[key] = _from_text(section, key, environ[name])
        variables[f"{where}.{key}"] = f"${name}"
    return variables


def _table(document: dict[str, Any], section: str, number: str | None) -> dict[str, Any] | None:
    """Where a variable's value goes, made when it is the next of its array; None when it has no place."""
    if number is None:
        table: Any = document.setdefault(section, {})
    else:
        tables: Any = document.setdefault(section, [{"name": "main", "root": True}] if section == "cache" else [])
        if not isinstance(tables, list) or int(number) > len(tables):
            return None
        if int(number) == len(tables):
            tables.append({})
        table = tables[int(number)]
    return table if isinstance(table, dict) else None


def _from_text(section: str, key: str, text: str) -> Any:
    """A value of the environment in the type that its key wants; what does not fit stays text and is refused later."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    kind: Any = sections.get(section)
    struct = getattr(kind, "__args__", (kind,))[0]
    types = {field.name: field.type for field in msgspec.structs.fields(struct)} if kind else {}
    wanted = types.get(key)
    kinds = (get_origin(wanted), wanted, *get_args(wanted), *map(get_origin, get_args(wanted)))
    if tuple in kinds:
        return [item.strip() for item in text.split(",") if item.strip()]
    if bool in kinds and text.lower() in {"true", "false", "1", "0"}:
        return text.lower() in {"true", "1"}
    if int in kinds and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    return text


def _contradictions(sections: Mapping[str, Any], wrong: _WrongKeys) -> list[str]:
    """What is wrong although each of the keys by itself is right."""
    return [
        *_contradictions_of_server(sections["server"], wrong),
        *_contradictions_of_storage(sections["storage"], wrong),
        *_contradictions_of_caches(sections["cache"], wrong),
        *_contradictions_of_upstreams(sections, wrong),
        *_contradictions_of_tokens(sections["token"], sections["cache"], wrong),
    ]


def _contradictions_of_server(server: Server, wrong: _WrongKeys) -> Iterator[str]:
    tls = ("tls_certificate", "tls_private_key")
    if wrong.without("server", *tls) and (server.tls_certificate is None) != (server.tls_private_key is None):
        yield "server: tls_certificate and tls_private_key belong together"
    if wrong.without("server", "store_dir"):
        try:
            check_store_dir(server.store_dir)
        except BadInput:
            yield f"server.store_dir = {server.store_dir!r}: expected an absolute path without a final /"


def _contradictions_of_storage(storage: Storage, wrong: _WrongKeys) -> Iterator[str]:
    if not wrong.without("storage", "kind", "bucket"):
        return
    if storage.kind == "s3" and storage.bucket is None:
        yield 'storage.bucket: is required for kind = "s3"'
    if storage.kind != "s3" and storage.bucket is not None:
        yield f'storage.bucket = {storage.bucket!r}: kind = "filesystem" puts nothing into a bucket, "s3" does'


def _contradictions_of_caches(caches: tuple[Cache, ...], wrong: _WrongKeys) -> Iterator[str]:
    yield from _repeated("cache", [cache.name for cache in caches])
    if not caches:
        yield "cache: at least one [[cache]] is needed"
    if sum(cache.root is True for cache in caches) > 1:
        yield "cache: only one cache can be the root"
    for number, cache in enumerate(caches):
        if cache.name in RESERVED_NAMES:
            yield f"cache[{number}].name = {cache.name!r}: is taken by the paths of HTTP, choose another"
    placed = (cache for number, cache in enumerate(caches) if wrong.without(f"cache[{number}]", "name", "prefix"))
    for outer, inner in permutations(sorted({cache.place for cache in placed}), 2):
        if not outer or inner.startswith(f"{outer}/"):
            yield f"cache: the prefix {inner!r} lies inside {outer!r}; expected the same prefix, or one beside it"


def _contradictions_of_upstreams(sections: Mapping[str, Any], wrong: _WrongKeys) -> Iterator[str]:
    names = [upstream.name for upstream in sections["upstream"]]
    yield from _repeated("upstream", names)
    caching = not wrong.without("delivery", "disk_cache_size") or sections["delivery"].disk_cache_size > 0
    for number, cache in enumerate(sections["cache"]):
        where = f"cache[{number}]"
        if wrong.without(where, "upstreams"):
            if wrong.without("upstream", "name"):
                missing = (name for name in cache.upstreams if name not in names)
                yield from (f"{where}.upstreams: no [[upstream]] is called {name!r}" for name in missing)
            if cache.references == "upstream" and not cache.upstreams:
                yield f'{where}.references = "upstream": needs at least one name in upstreams'
            if cache.pull_through and not cache.upstreams:
                yield f"{where}.pull_through = true: needs at least one name in upstreams"
        for key in ("retention_age", "retention_size"):
            if cache.authority == "bucket" and (value := getattr(cache, key)):
                yield f"{where}.{key} = {value}: what others write to the bucket is collected where they do"
        if cache.pull_through and not caching:
            yield f"{where}.pull_through = true: needs a delivery.disk_cache_size above 0"


def _contradictions_of_tokens(tokens: tuple[Token, ...], caches: tuple[Cache, ...], wrong: _WrongKeys) -> Iterator[str]:
    yield from _repeated("token", ["push-token", *(token.name for token in tokens)])
    hashes = [token.sha256 for number, token in enumerate(tokens) if wrong.without(f"token[{number}]", "sha256")]
    if len(set(hashes)) < len(hashes):
        yield "token: two of them have the same sha256"
    names = [cache.name for cache in caches]
    if not names or not wrong.without("cache", "name"):
        return
    for number, token in enumerate(tokens):
        for pattern in token.caches if wrong.without(f"token[{number}]", "caches") else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                yield f"token[{number}].caches: no cache matches {pattern!r}; there are {', '.join(names)}"


def _repeated(section: str, names: Sequence[str | None]) -> list[str]:
    """Names that two tables have; None is of one that has none."""
    given = [name for name in names if name is not None]
    return [f"{section}: the name {name!r} is used twice" for name in sorted({n for n in given if given.count(n) > 1})]
