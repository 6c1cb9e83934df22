"""ledger.jsonl as the coordinator writes it: an entry a step of a timeline, appended and never rewritten."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from coordinator.core.events import StepSummary
from shardlane.files import append_to_file
from shardlane.ids import Timeline, Version
from shardlane.ledger import Entry, Expected, TimelineStart, from_line, to_line


class LedgerFile:
    """For one thread at a time."""

    def __init__(self, path: Path, expects: Expected) -> None:
        """Goes on behind what is there, less a torn last line, of a crash. Raises `OSError`."""
        self._path, self._expects = path, expects
        self._pending: list[bytes] = []
        self.timeline = -1  # id of the last one; -1: there was none
        self.version = Version(0)  # there are entries, pending ones too, of its steps below
        lines = _whole_lines(path)
        for line in reversed(lines):
            with suppress(ValueError):  # whoever judges the ledger says so
                item = from_line(line)
                self.timeline = item.timeline
                self.version = Version(item.step + 1 if isinstance(item, Entry) else item.version)
                break

    def begin(self, timeline: Timeline, reason: str) -> None:
        """Entries from now on are of `timeline`, which may go on already. For the next `flush`."""
        if timeline.id == self.timeline:
            return
        lost_steps = max(0, self.version - timeline.version)
        start = TimelineStart(timeline.id, timeline.version, lost_steps, reason, self._expects)
        self._pending.append(to_line(start))
        self.timeline, self.version = timeline.id, timeline.version

    def append(self, summary: StepSummary) -> None:
        """Takes the entry of a step for the next `flush`, unless it is there: a restart is told again what was on its way."""
        if summary.step < self.version:
            return
        entry = Entry(summary.step, self.timeline, summary.tokens, summary.tally, summary.skipped, summary.refused)
        self._pending.append(to_line(entry))
        self.version = Version(summary.step + 1)

    def flush(self) -> None:
        """Makes what is pending durable, or raises `OSError`, keeps it, and leaves no half of it behind."""
        if self._pending:
            append_to_file(self._path, b"".join(self._pending))
            self._pending.clear()


def _whole_lines(path: Path) -> list[bytes]:
    """Cuts a torn last line off the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    return whole.splitlines(keepends=True)
