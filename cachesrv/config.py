"""The configuration: TOML and environment to frozen structs. Builds nothing, opens nothing but the file.

Every key stands in `config.example.toml` with its default and why. Unknown keys are refused, and all mistakes are
reported at once. Any key can come from the environment, as `CACHESRV_<SECTION>__<KEY>`; the tables of an array are
counted: `CACHESRV_CACHE__0__PRIORITY=30`. Environment wins over file.

Sizes are bytes or "10 GiB"; durations are seconds or "30 min". Secrets come by file only.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Size = Annotated[int, msgspec.Meta(ge=0, title="size")]
Duration = Annotated[int, msgspec.Meta(ge=0, title="duration")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
CacheName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z][0-9A-Za-z_-]{0,62}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
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

    listen: tuple[str, ...] = ("127.0.0.1:5000",)
    workers: Positive = 1
    base_url: str | None = None
    store_dir: str = "/nix/store"
    tls_certificate: str | None = None
    tls_private_key: str | None = None
    max_nar_size: Size = 0
    stall_timeout: Positive = 60
    shutdown_timeout: Duration = 60


class Storage(msgspec.Struct, frozen=True):
    """Where the objects lie."""

    kind: Literal["filesystem"] = "filesystem"
    path: str | None = None


class Catalog(msgspec.Struct, frozen=True):
    """The SQL database."""

    url: str | None = None
    pool_size: Positive = 5


class Index(msgspec.Struct, frozen=True):
    """The memory-mapped index."""

    path: str | None = None
    size_limit: Size = 64 * 2**30


class Lookup(msgspec.Struct, frozen=True):
    """What is remembered of paths that are not there."""

    negative_ttl: Positive = 3600
    negative_limit: Positive = 1_000_000


class Cache(msgspec.Struct, frozen=True):
    """One binary cache."""

    name: CacheName
    prefix: str | None = None
    root: bool = False
    public: bool = True
    priority: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 40
    want_mass_query: bool = True
    signing_key_files: tuple[str, ...] | None = None
    references: Literal["strict", "any"] = "strict"
    trusted_keys: tuple[str, ...] = ()


class Token(msgspec.Struct, frozen=True):
    """Who may do what; the token itself is known to its holder only."""

    name: str
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
    cache: tuple[Cache, ...] = (Cache(name="main", root=True),)
    token: tuple[Token, ...] = ()

    def listening(self, addresses: tuple[str, ...]) -> Config:
        """The same, at other addresses."""
        return msgspec.structs.replace(self, server=msgspec.structs.replace(self.server, listen=addresses))


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
    _overlay_environment(document, environ, mistakes)
    values: dict[str, Any] = {"data_dir": directory}
    sections = {field.name: field.type for field in msgspec.structs.fields(Config) if field.name != "data_dir"}
    for key, value in document.items():
        if key in sections:
            values[key] = _section(sections[key], value, key, mistakes)
        else:
            mistakes.append(f"{key}: no such section; there are {', '.join(sections)}")
    if not mistakes:
        config = Config(**values)
        mistakes = _contradictions(config)
        if not mistakes:
            return config
    source = str(path) if path else "environment"
    raise ConfigError("\n".join(f"{source}: {mistake}" for mistake in mistakes))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _section(kind: Any, value: Any, where: str, mistakes: list[str]) -> Any:
    """A struct, or a list of them, from a table or an array of tables."""
    if getattr(kind, "__origin__", None) is tuple:
        if not isinstance(value, list):
            mistakes.append(f"{where}: expected an array of tables, written [[{where}]]")
            return None
        item = kind.__args__[0]
        return tuple(_struct(item, table, f"{where}[{number}]", mistakes) for number, table in enumerate(value))
    return _struct(kind, value, where, mistakes)


def _struct(kind: type[msgspec.Struct], table: Any, where: str, mistakes: list[str]) -> Any:
    if not isinstance(table, dict):
        mistakes.append(f"{where}: expected a table, found {table!r}")
        return None
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    before = len(mistakes)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            mistakes.append(f"{where}.{key}: no such key; there are {', '.join(known)}")
            continue
        try:
            values[key] = _value(known[key].type, value)
        except (msgspec.ValidationError, ValueError) as error:
            mistakes.append(f"{where}.{key} = {value!r}: {str(error)[:1].lower()}{str(error)[1:]}")
    mistakes += [f"{where}.{name}: is required" for name, f in known.items() if f.required and name not in table]
    return kind(**values) if len(mistakes) == before else None


def _value(kind: Any, value: Any) -> Any:
    for meta in getattr(kind, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.title in _UNITS and isinstance(value, str):
            return msgspec.convert(_with_unit(value, meta.title), kind)
    return msgspec.convert(value, kind)


def _with_unit(text: str, measure: str) -> int:
    units = _UNITS[measure]
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in units:
        example = "10 GiB" if measure == "size" else "30 min"
        raise ValueError(f"expected a {measure} such as {example!r}")
    return int(match[1]) * units[match[2].lower()]


def _overlay_environment(document: dict[str, Any], environ: Mapping[str, str], mistakes: list[str]) -> None:
    for name in sorted(environ):
        if not name.startswith("CACHESRV_") or "__" not in name:
            continue
        section, *rest = name.removeprefix("CACHESRV_").lower().split("__")
        table: Any = document.setdefault(section, [] if rest[0].isdigit() else {})
        if rest[0].isdigit() and isinstance(table, list):
            number = int(rest.pop(0))
            if number > len(table):
                mistakes.append(f"${name}: there are only {len(table)} tables before it, expected number {len(table)}")
                continue
            if number == len(table):
                table.append({})
            table = table[number]
        if len(rest) != 1 or not isinstance(table, dict):
            mistakes.append(f"${name}: expected CACHESRV_<SECTION>__<KEY>, or CACHESRV_<SECTION>__<NUMBER>__<KEY>")
            continue
        table[rest[0]] = _from_text(section, rest[0], environ[name])


def _from_text(section: str, key: str, text: str) -> Any:
    """A value of the environment in the type that its key wants; what does not fit stays text and is refused later."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    kind: Any = sections.get(section)
    struct = getattr(kind, "__args__", (kind,))[0]
    types = {field.name: field.type for field in msgspec.structs.fields(struct)} if kind else {}
    wanted = str(types.get(key, ""))
    if "tuple[" in wanted:
        return [item.strip() for item in text.split(",") if item.strip()]
    if wanted == "<class 'bool'>" and text.lower() in {"true", "false", "1", "0"}:
        return text.lower() in {"true", "1"}
    if "int" in wanted and re.fullmatch(r"-?\d+", text):
        return int(text)
    return text


def _contradictions(config: Config) -> list[str]:
    """What is wrong although each key by itself is right."""
    mistakes: list[str] = []
    mistakes += _repeated("cache", [cache.name for cache in config.cache])
    mistakes += _repeated("token", [token.name for token in config.token])
    if not config.cache:
        mistakes.append("cache: at least one [[cache]] is needed")
    if sum(cache.root for cache in config.cache) > 1:
        mistakes.append("cache: only one cache can be the root")
    for number, cache in enumerate(config.cache):
        where = f"cache[{number}]"
        if cache.name in RESERVED_NAMES:
            mistakes.append(f"{where}.name = {cache.name!r}: is taken by the paths of HTTP, choose another")
    if (config.server.tls_certificate is None) != (config.server.tls_private_key is None):
        mistakes.append("server: tls_certificate and tls_private_key belong together")
    if not config.server.store_dir.startswith("/") or config.server.store_dir.endswith("/"):
        mistakes.append(f"server.store_dir = {config.server.store_dir!r}: expected an absolute path without a final /")
    return mistakes


def _repeated(section: str, names: list[str]) -> list[str]:
    return [f"{section}: the name {name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]
