"""The coordinator's memory: SQLite in WAL mode. A start takes the next term; every write is conditional on that term.

An older coordinator that wakes up finds its term taken at its next write and is fenced by that.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from coordinator.core.beginning import Saved
from coordinator.core.events import Registration, TokenUse
from shardlane.errors import UserError
from shardlane.ids import Incarnation, Version

ReportKind = Literal["validation", "checkpoint"]

_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    term INTEGER NOT NULL,
    run_id TEXT NOT NULL,
    identity TEXT NOT NULL,
    timeline INTEGER NOT NULL,
    plan BLOB,
    saved TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS members (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    incarnation TEXT UNIQUE NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS reports (
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    key TEXT NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (kind, version, key)
);
CREATE TABLE IF NOT EXISTS token_uses (
    nonce TEXT PRIMARY KEY,
    incarnation TEXT NOT NULL,
    address TEXT NOT NULL,
    expires_seconds INTEGER NOT NULL
);
"""


class FencedError(UserError):
    """Another coordinator has taken over this run."""


@dataclass(frozen=True)
class Snapshot:
    """What an earlier coordinator left. `run_id` is empty on a new store."""

    run_id: str
    identity: str  # of the config's mathematics and the data, as `begin` was given it
    timeline: int  # id of the last one; -1: there was none
    plan: bytes | None  # of this session; None before its first
    saved: Saved
    registrations: tuple[Registration, ...]
    reports: tuple[tuple[ReportKind, bytes], ...]  # of versions that are not settled yet


class Store:
    """For one thread at a time. Every write raises `FencedError` once the term is taken, `sqlite3.Error` on a full disk."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the store and takes the next term. Raises `UserError` if that cannot be."""
        self._path = path
        try:
            self._connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a plan is durable before it is first sent
            (found,) = self._connection.execute("PRAGMA user_version").fetchone()
            if found not in (0, _FORMAT):
                raise UserError(f"{path} has format {found}, this Shardlane reads {_FORMAT}; use the one that wrote it")
            self._connection.executescript(f"{_SCHEMA}PRAGMA user_version = {_FORMAT};")
            self.term = self._take_term()
        except sqlite3.Error as error:
            raise UserError(
                f"cannot keep the run's state in {path}: {error}; free the disk, or give another --run-dir"
            ) from error

    def _take_term(self) -> int:
        insert = "INSERT OR IGNORE INTO run VALUES (1, 0, '', '', -1, NULL, ?)"
        self._connection.execute(insert, (json.dumps(asdict(Saved())),))
        while True:
            (term,) = self._connection.execute("SELECT term FROM run").fetchone()
            if self._connection.execute("UPDATE run SET term = ? WHERE term = ?", (term + 1, term)).rowcount:
                return int(term) + 1

    def load(self) -> Snapshot:
        query = "SELECT run_id, identity, timeline, plan, saved FROM run"
        run_id, identity, timeline, plan, saved = self._connection.execute(query).fetchone()
        members = self._connection.execute("SELECT body FROM members ORDER BY place").fetchall()
        reports = self._connection.execute("SELECT kind, body FROM reports ORDER BY version, kind, key").fetchall()
        registrations = tuple(Registration(**json.loads(body)) for (body,) in members)
        return Snapshot(run_id, identity, timeline, plan, Saved(**json.loads(saved)), registrations, tuple(reports))

    def begin(self, run_id: str, identity: str, timeline: int) -> None:
        """A session with no plan and nobody in it yet: forgets members, reports and what was asked for."""
        with self._writing() as connection:
            values = (run_id, identity, timeline, json.dumps(asdict(Saved())))
            connection.execute("UPDATE run SET run_id = ?, identity = ?, timeline = ?, plan = NULL, saved = ?", values)
            connection.execute("DELETE FROM members")
            connection.execute("DELETE FROM reports")

    def save_plan(self, plan: bytes, timeline: int) -> None:
        with self._writing() as connection:
            connection.execute("UPDATE run SET plan = ?, timeline = ?", (plan, timeline))

    def save(self, saved: Saved) -> None:
        with self._writing() as connection:
            connection.execute("UPDATE run SET saved = ?", (json.dumps(asdict(saved)),))

    def keep_member(self, registration: Registration) -> None:
        with self._writing() as connection:
            values = (registration.incarnation, json.dumps(asdict(registration)))
            connection.execute("INSERT OR REPLACE INTO members (incarnation, body) VALUES (?, ?)", values)

    def forget_member(self, incarnation: Incarnation) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM members WHERE incarnation = ?", (incarnation,))

    def keep_report(self, kind: ReportKind, version: Version, key: str, body: bytes) -> None:
        """A report is kept until what it is a part of is whole; a later one of the same key takes its place."""
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)", (kind, version, key, body))

    def settle_validation(self, version: Version) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM reports WHERE kind = 'validation' AND version = ?", (version,))

    def settle_checkpoints(self, version: Version) -> None:
        """A checkpoint of `version` exists; older ones that are not whole will not be."""
        with self._writing() as connection:
            connection.execute("DELETE FROM reports WHERE kind = 'checkpoint' AND version <= ?", (version,))

    def drop_reports_after(self, version: Version) -> None:
        """A roll-back to `version`: reports of later versions are void."""
        with self._writing() as connection:
            connection.execute("DELETE FROM reports WHERE version > ?", (version,))

    def keep_use(self, use: TokenUse, unix_seconds: float) -> None:
        """A join token was used; those that have expired by `unix_seconds` are forgotten. It outlives `begin`."""
        with self._writing() as connection:
            connection.execute("DELETE FROM token_uses WHERE expires_seconds <= ?", (int(unix_seconds),))
            values = (use.nonce, use.incarnation, use.address, use.expires_seconds)
            connection.execute("INSERT OR REPLACE INTO token_uses VALUES (?, ?, ?, ?)", values)

    def token_uses(self) -> list[TokenUse]:
        query = "SELECT nonce, incarnation, address, expires_seconds FROM token_uses"
        return [TokenUse(*row) for row in self._connection.execute(query).fetchall()]

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds only under our own term."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            (term,) = self._connection.execute("SELECT term FROM run").fetchone()
            if term != self.term:
                raise FencedError(f"coordinator term {term} has taken over {self._path}; this one, of term {self.term}, stops")
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
