"""The SQLite database of a local store, opened for reading alone.

    ValidPaths          id, path, hash (sha256:<base16>), registrationTime, deriver, narSize, ultimate, sigs, ca
    Refs                referrer, reference: ids; a path that names itself has a row (id, id)
    Realisations        id, drvPath (sha256:<base16>), outputName, outputPath (id), signatures; up to Nix 2.34
    RealisationsRefs    referrer, realisationReference: ids of Realisations
    BuildTraceV3        drvPath (base name), outputName, outputPath, signatures; since Nix 2.35

The last three are there only where content-addressed derivations are or were enabled. While a database with a
write-ahead log is read, SQLite keeps files of that log beside it, as Nix does, and may leave them there.
[Nix, src/libstore/schema.sql, ca-specific-schema.sql, local-store.cc]
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TypeAlias

from cachesrv.errors import BadInput, NotFound, StoreError, StoreUnavailable
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput
from cachesrv.nix.signing import Signature, readable_signatures
from cachesrv.nix.store_path import StorePath
from cachesrv.push.store_location import StoreLocation

SCHEMA = 10
"""Number in the file `schema` beside the database; of all Nix since 2.0."""
LOCK_PATIENCE = 30.0
"""Seconds to wait for a writer that locks the whole database, as it happens without write-ahead log."""

UNREACHABLE = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_AUTH")
"""Names of errors that say nothing about what the database holds."""
NEEDS_WRITING = ("SQLITE_CANTOPEN", "SQLITE_READONLY")
"""Names of errors where SQLite would have to make files beside the database."""

# The planner may not reorder CROSS JOIN: the few ids on the left lead, whatever statistics it has.
ONLY = "WITH wanted(id) AS (SELECT id FROM ValidPaths WHERE path IN (SELECT value FROM json_each(?))) "
CLOSURE = (
    "WITH RECURSIVE wanted(id) AS (SELECT id FROM ValidPaths WHERE path IN (SELECT value FROM json_each(?))"
    " UNION SELECT reference FROM wanted CROSS JOIN Refs ON referrer = wanted.id) "
)
INFOS = (
    "SELECT v.id, CAST(v.path AS TEXT), CAST(v.hash AS TEXT), CAST(v.narSize AS INTEGER), CAST(v.deriver AS TEXT),"
    " CAST(v.sigs AS TEXT), CAST(v.ca AS TEXT), CAST(v.registrationTime AS INTEGER), v.ultimate"
    " FROM wanted CROSS JOIN ValidPaths v ON v.id = wanted.id"
)
REFERENCES = (
    "SELECT r.referrer, CAST(v.path AS TEXT) FROM wanted CROSS JOIN Refs r ON r.referrer = wanted.id"
    " CROSS JOIN ValidPaths v ON v.id = r.reference"
)
REALISATIONS = (
    "SELECT r.id, r.drvPath, r.outputName, v.path, r.signatures FROM wanted"
    " CROSS JOIN Realisations r ON r.outputPath = wanted.id CROSS JOIN ValidPaths v ON v.id = wanted.id"
)
DEPENDENCIES = (
    "SELECT l.referrer, r.drvPath, r.outputName, v.path FROM json_each(?)"
    " CROSS JOIN RealisationsRefs l ON l.referrer = value"
    " CROSS JOIN Realisations r ON r.id = l.realisationReference CROSS JOIN ValidPaths v ON v.id = r.outputPath"
)
OUTPUTS = (
    "SELECT CAST(path AS TEXT), CAST(deriver AS TEXT) FROM ValidPaths"
    " WHERE deriver IN (SELECT value FROM json_each(?)) ORDER BY id"
)
REGISTERED = "SELECT id, CAST(path AS TEXT) FROM ValidPaths WHERE id > ? ORDER BY id LIMIT ?"
BUILD_TRACE = (
    "SELECT drvPath, outputName, outputPath, signatures FROM BuildTraceV3"
    " WHERE outputPath IN (SELECT value FROM json_each(?))"
)


Row: TypeAlias = tuple[int, str, str, int | None, str | None, str | None, str | None, int, int | None]


class StoreDatabase:
    """Questions to the database, each over its own connection and from one state of it; they block.

    Raises `StoreUnavailable` where the database is not there, may not be read or is locked, `StoreError` for what
    else goes wrong with it, and `BadInput` for rows that no Nix would write.
    """

    def __init__(self, location: StoreLocation) -> None:
        self.file = location.state_dir / "db" / "db.sqlite"
        self._store_dir = location.store_dir

    @property
    def readable(self) -> bool:
        return os.access(self.file, os.R_OK)

    def check(self) -> None:
        """Makes sure that the database can be read and has a schema that we know."""
        schema = self._schema()
        if schema != SCHEMA:
            age, remedy = ("newer", "update cachesrv") if schema > SCHEMA else ("older", "run nix-store --verify once")
            raise StoreError(f"{self.file} has schema {schema}, {age} than the {SCHEMA} that we read: {remedy}")
        with self._reading() as db:
            db.execute("SELECT 1 FROM ValidPaths JOIN Refs ON referrer = id LIMIT 1").fetchone()

    def path_info(self, path: StorePath) -> PathInfo:
        """Raises `NotFound` if the path is not valid."""
        return self._infos(ONLY, [path])[0]

    def closure(self, paths: Iterable[StorePath]) -> list[PathInfo]:
        """All that `paths` need, in reference order; raises `NotFound` for one of `paths` that is not valid."""
        return in_reference_order(self._infos(CLOSURE, sorted(set(paths))))

    def outputs(self, derivers: Iterable[StorePath]) -> dict[StorePath, list[StorePath]]:
        """The valid paths that came out of each of these derivations, as far as is known."""
        found: dict[StorePath, list[StorePath]] = {deriver: [] for deriver in derivers}
        names = json.dumps([deriver.full(self._store_dir) for deriver in found])
        with self._reading() as db:
            for path, deriver in db.execute(OUTPUTS, (names,)):
                found[self._path(deriver)].append(self._path(path))
        return found

    def newest(self) -> int:
        """The greatest number that a path has been given so far, 0 before the first."""
        with self._reading() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'ValidPaths'").fetchone()
            return int(row[0]) if row else 0

    def registered_after(self, number: int, most: int) -> list[tuple[int, str]]:
        """Valid paths, in full, with greater numbers: the first of them, in the order in which they became valid."""
        with self._reading() as db:
            return db.execute(REGISTERED, (number, most)).fetchall()

    def realisations(self, paths: Iterable[StorePath]) -> dict[OutputId | TracedOutput, Realisation]:
        """What outputs of content-addressed derivations are known to have come out as one of `paths`."""
        wanted = json.dumps([path.full(self._store_dir) for path in paths])
        with self._reading() as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found: dict[OutputId | TracedOutput, Realisation] = {}
            if "Realisations" in tables:
                found.update(self._realisations(db, wanted))
            if "BuildTraceV3" in tables:
                found.update(self._build_trace(db, wanted))
            return found

    def _infos(self, wanted: str, paths: list[StorePath]) -> list[PathInfo]:
        names = json.dumps([path.full(self._store_dir) for path in paths])
        with self._reading() as db:
            rows = db.execute(wanted + INFOS, (names,)).fetchall()
            known = {row[1]: self._path(row[1]) for row in rows}
            references: dict[int, list[StorePath]] = {row[0]: [] for row in rows}
            for referrer, reference in db.execute(wanted + REFERENCES, (names,)):
                references[referrer].append(known.get(reference) or self._path(reference))
            infos = [self._info(known[row[1]], references[row[0]], row) for row in rows]
        for path in paths:
            if path.full(self._store_dir) not in known:
                raise NotFound(f"{path.full(self._store_dir)} is not valid: {self.file} does not know it")
        return infos

    def _info(self, path: StorePath, references: list[StorePath], row: Row) -> PathInfo:
        _, _, nar_hash, nar_size, deriver, signatures, ca, registration_time, ultimate = row
        return PathInfo(
            store_path=path,
            nar_hash=Hash.parse(nar_hash, "sha256"),
            nar_size=nar_size or 0,
            references=tuple(sorted(references)),
            deriver=self._path(deriver) if deriver else None,
            signatures=tuple(sorted((signatures or "").split())),
            ca=ca or None,
            registration_time=registration_time,
            ultimate=bool(ultimate),
        )

    def _realisations(self, db: sqlite3.Connection, wanted: str) -> Iterator[tuple[OutputId, Realisation]]:
        rows = db.execute(ONLY + REALISATIONS, (wanted,)).fetchall()
        dependencies: dict[int, list[tuple[OutputId, StorePath]]] = {row[0]: [] for row in rows}
        for referrer, drv, output, path in db.execute(DEPENDENCIES, (json.dumps(list(dependencies)),)):
            dependencies[referrer].append((OutputId(drv, output), self._path(path)))
        for id_, drv, output, path, signatures in rows:
            needed = tuple(sorted(dependencies[id_]))
            yield OutputId(drv, output), Realisation(self._path(path), _signatures(signatures), needed)

    def _build_trace(self, db: sqlite3.Connection, wanted: str) -> Iterator[tuple[TracedOutput, Realisation]]:
        for drv, output, path, signatures in db.execute(BUILD_TRACE, (wanted,)):
            yield TracedOutput.parse(drv, output), Realisation(self._path(path), _signatures(signatures))

    def _path(self, text: str) -> StorePath:
        return StorePath.parse_full(text, self._store_dir)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction, so that all its queries see one state."""
        try:
            with closing(self._open()) as db:
                yield db
        except sqlite3.Error as error:
            kind = StoreUnavailable if _code(error).startswith(UNREACHABLE) else StoreError
            raise kind(f"the store's database {self.file} cannot be read: {error}") from error
        except BadInput as error:
            raise BadInput(f"the store's database {self.file} holds what no Nix writes: {error}") from error

    def _open(self) -> sqlite3.Connection:
        try:
            return self._begin("mode=ro")
        except sqlite3.OperationalError as error:
            if _code(error).startswith(NEEDS_WRITING) and self._lies_still():
                return self._begin("mode=ro&immutable=1")
            raise

    def _lies_still(self) -> bool:
        """Whether no process has the database open or died over it, so that the one file is all there is.

        A database with a write-ahead log cannot be opened in a folder where the log's index cannot be made.
        """
        index, *logs = (self.file.with_name(f"{self.file.name}-{suffix}") for suffix in ("shm", "wal", "journal"))
        try:
            return not index.exists() and not any(log.exists() and log.stat().st_size for log in logs)
        except OSError:  # it may not be known
            return False

    def _begin(self, options: str) -> sqlite3.Connection:
        uri = f"{self.file.as_uri()}?{options}"
        db = sqlite3.connect(uri, uri=True, timeout=LOCK_PATIENCE, isolation_level=None)
        try:
            db.execute("BEGIN")
            db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    def _schema(self) -> int:
        try:
            return int(self.file.with_name("schema").read_text())
        except FileNotFoundError:
            raise StoreUnavailable(f"there is no Nix store with a database at {self.file}") from None
        except OSError as error:
            raise StoreUnavailable(f"{self.file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise StoreError(f"{self.file} stands beside a file schema that is no number") from None


def _code(error: sqlite3.Error) -> str:
    """SQLite's name of the error; empty for those that Python raises itself."""
    return getattr(error, "sqlite_errorname", "")


def _signatures(column: str | None) -> tuple[Signature, ...]:
    return readable_signatures(sorted((column or "").split()))
