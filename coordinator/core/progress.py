"""What the run has learnt: steps in order, validations whole, checkpoints complete. Each report counts once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from coordinator.core.events import CheckpointReport, StepSummary, TrainingRow, ValidationReport
from shardlane.ids import ChunkId, Version

OPEN_MAX = 64  # versions that are validated or checkpointed at one time; the oldest are given up


class Steps:
    """Summaries of steps, taken in order and once, whichever shard tells them."""

    def __init__(self, version: Version, staleness: int = 0) -> None:
        self.version = version  # steps below it are known
        self._staleness = staleness  # steps that workers may be ahead of it
        self.newest: StepSummary | None = None
        self.tokens_per_second = 0.0
        self.num_skipped = 0
        self._since_seconds: float | None = None  # when the time of the next step began to count

    def rewind(self, version: Version) -> None:
        self.version, self.newest = version, None

    def start_clock(self, now: float) -> None:
        self._since_seconds = now

    def forecast(self, now: float, ahead_seconds: float) -> Version:
        """A step that nobody begins before `ahead_seconds` from now, if steps last as they did; 0: not known."""
        if self.newest is None or not self.tokens_per_second or self._since_seconds is None:
            return Version(0)
        step_seconds = self.newest.tokens / self.tokens_per_second
        return Version(self.version + 2 + self._staleness + int((now - self._since_seconds + ahead_seconds) / step_seconds))

    def take(self, summaries: Iterable[StepSummary], now: float) -> list[TrainingRow]:
        """Rows of the steps that are new. Steps that came in one report share its time."""
        fresh = []
        for summary in sorted(summaries, key=lambda each: each.step):
            if summary.step == int(self.version):
                fresh.append(summary)
                self.version = Version(self.version + 1)
        if not fresh:
            return []
        elapsed = 0.0 if self._since_seconds is None else now - self._since_seconds
        self.tokens_per_second = sum(each.tokens for each in fresh) / elapsed if elapsed > 0 else 0.0
        self._since_seconds = now
        self.newest = fresh[-1]
        self.num_skipped += sum(each.skipped for each in fresh)
        return [TrainingRow(each, self.tokens_per_second) for each in fresh]


class Validations:
    """Micro-batches of each validation, until all are in."""

    def __init__(self, num_micro_batches: int) -> None:
        self.newest: tuple[Version, float] | None = None
        self._num_micro_batches = num_micro_batches
        self._open: dict[Version, dict[int, tuple[float, int]]] = {}
        self._done: set[Version] = set()

    def is_done(self, version: Version) -> bool:
        return version in self._done

    def mark_done(self, version: Version, loss: float) -> None:
        self._done.add(version)
        if self.newest is None or version >= self.newest[0]:
            self.newest = (version, loss)

    def rewind(self, version: Version) -> None:
        """Forgets what belongs to later versions."""
        self._open = {each: parts for each, parts in self._open.items() if each <= version}
        self._done = {each for each in self._done if each <= version}
        if self.newest is not None and self.newest[0] > version:
            self.newest = None

    def take(self, report: ValidationReport) -> float | None:
        """The mean loss, once the last micro-batch is in; sums are added in index order."""
        if report.version in self._done or not 0 <= report.index < self._num_micro_batches:
            return None
        parts = self._open.setdefault(report.version, {})
        parts.setdefault(report.index, (report.loss_sum, report.tokens))
        if len(parts) < self._num_micro_batches:
            _bound(self._open)
            return None
        del self._open[report.version]
        num_tokens = sum(tokens for _, tokens in parts.values())
        loss = math.fsum(parts[index][0] for index in range(self._num_micro_batches)) / num_tokens if num_tokens else math.nan
        self.mark_done(report.version, loss)
        return loss


class Checkpoints:
    """Parts of each checkpoint, until every chunk is in one."""

    def __init__(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._open: dict[Version, dict[str, CheckpointReport]] = {}  # by file
        self._committing: set[Version] = set()

    def take(self, report: CheckpointReport) -> tuple[CheckpointReport, ...]:
        """All parts, once they cover every chunk. Asked once for each version, unless `give_up` reopens it."""
        if report.version in self._committing:
            return ()
        parts = self._open.setdefault(report.version, {})
        parts[report.file] = report
        covered: set[ChunkId] = set().union(*(part.chunks for part in parts.values()))
        if len(covered) < self._num_chunks:
            _bound(self._open)
            return ()
        self._committing.add(report.version)
        del self._open[report.version]
        return tuple(parts[each] for each in sorted(parts))

    def give_up(self, version: Version) -> None:
        self._open.pop(version, None)
        self._committing.discard(version)

    def finish(self, version: Version) -> None:
        """A checkpoint of `version` exists: older ones that are still incomplete will not be."""
        self._open = {each: parts for each, parts in self._open.items() if each > version}
        self._committing = {each for each in self._committing if each > version}

    def clear(self) -> None:
        self._open.clear()
        self._committing.clear()


def _bound(opened: dict[Version, Any]) -> None:
    while len(opened) > OPEN_MAX:
        del opened[min(opened)]
