"""What a restart finds, and who may write."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from coordinator.core.beginning import Saved
from coordinator.store import FencedError, Store
from shardlane.errors import UserError
from shardlane.ids import Version
from tests.coordinator.cast import registration


def test_a_new_store_is_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    found = store.load()
    assert (store.term, found.run_id, found.timeline, found.plan, found.saved) == (1, "", -1, None, Saved())
    assert found.registrations == () and found.reports == ()


def test_what_was_written_is_found_by_the_next_term(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.begin("run-1", "mathematics", 3)
    store.save_plan(b"plan", 3)
    store.save(Saved(paused=True, requests=1, end_version=Version(7), finished=False))
    for name in ("worker 2", "shard 1", "worker 1"):
        store.keep_member(registration(name))
    store.forget_member(registration("shard 1").incarnation)
    for version in (2, 4):
        store.keep_report("checkpoint", Version(version), "shard-01", b"old")
        store.keep_report("checkpoint", Version(version), "shard-01", b"part %d" % version)
        store.keep_report("validation", Version(version), "0", b"loss %d" % version)
    store.settle_checkpoints(Version(2))
    store.settle_validation(Version(4))
    store.close()
    again = Store(tmp_path / "s.sqlite")
    found = again.load()
    assert (again.term, found.run_id, found.identity, found.timeline, found.plan) == (2, "run-1", "mathematics", 3, b"plan")
    assert found.saved == Saved(paused=True, requests=1, end_version=Version(7))
    assert found.registrations == (registration("worker 2"), registration("worker 1"))  # in order of arrival
    assert found.reports == (("validation", b"loss 2"), ("checkpoint", b"part 4"))
    again.drop_reports_after(Version(2))
    assert again.load().reports == (("validation", b"loss 2"),)
    again.begin("run-2", "other", 4)
    found = again.load()
    assert (found.run_id, found.timeline, found.plan, found.saved, found.registrations) == ("run-2", 4, None, Saved(), ())
    assert found.reports == ()


def test_an_old_coordinator_that_wakes_up_is_fenced(tmp_path: Path) -> None:
    old = Store(tmp_path / "s.sqlite")
    old.begin("run-1", "", 0)
    new = Store(tmp_path / "s.sqlite")
    for write in (
        lambda: old.save_plan(b"stale", 0),
        lambda: old.save(Saved(paused=True)),
        lambda: old.keep_member(registration("worker 1")),
        lambda: old.begin("run-0", "", 0),
    ):
        with pytest.raises(FencedError, match="term 2 has taken over"):
            write()
    assert new.load().plan is None and new.load().run_id == "run-1"
    new.save_plan(b"fresh", 0)


def test_terms_are_taken_once_however_many_start_together(tmp_path: Path) -> None:
    Store(tmp_path / "s.sqlite").close()
    terms: list[int] = []
    threads = [threading.Thread(target=lambda: terms.append(Store(tmp_path / "s.sqlite").term)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(terms) == list(range(2, 10))


def test_a_failed_write_leaves_nothing_half_done(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.begin("run-1", "", 0)
    with pytest.raises(sqlite3.Error), store._writing() as connection:
        connection.executemany("UPDATE run SET run_id = ?, timeline = ?", [("half", 1), ("half",)])
    assert store.load().run_id == "run-1"


def test_a_file_that_is_no_store_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"not a database, but long enough to be looked at as one" * 40)
    with pytest.raises(UserError, match="cannot keep the run's state"):
        Store(tmp_path / "s.sqlite")
    with sqlite3.connect(tmp_path / "t.sqlite") as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(UserError, match="has format 9"):
        Store(tmp_path / "t.sqlite")
