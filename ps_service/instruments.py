"""What a shard shows on `/metrics`: instruments that read its state when they are scraped."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from ps_service.core.messages import Decision, Outcome
from shardlane.ids import ChunkId, Step, Version
from shardlane.metrics import Metrics

if TYPE_CHECKING:
    from ps_service.shard import Shard


class ShardInstruments:
    """Made once for a process; `watch` says whose state to read."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.pushed_bytes = metrics.counter("shardlane_shard_pushed_bytes_total", "Gradient bytes received and counted.")
        self.pulled_bytes = metrics.counter("shardlane_shard_pulled_bytes_total", "Parameter bytes sent to workers.")
        self.refilled_bytes = metrics.counter(
            "shardlane_shard_refilled_bytes_total",
            "Bytes received to become another copy of chunks, whether still wanted or not.",
        )
        self.contributions = metrics.counter("shardlane_shard_contributions_total", "Contributions, by answer.", ("outcome",))
        for outcome in Outcome:
            self.contributions.labels(outcome.value)  # a rate needs the zero before the first
        self.skipped_steps = metrics.counter("shardlane_shard_skipped_steps_total", "Steps skipped for gradients not finite.")
        self.refused_turns = metrics.counter(
            "shardlane_shard_refused_turns_total",
            "Contributions not applied, under ASP, for the age of what they were computed from.",
        )
        self.staleness = metrics.histogram(
            "shardlane_shard_staleness_versions",
            "Versions made since the one that a contribution was computed from, under ASP.",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
        )
        self.alarms = metrics.counter("shardlane_shard_alarms_total", "Things that must not happen and did.")
        self.digest_mismatches = metrics.counter(
            "shardlane_shard_digest_mismatches_total", "Copies here that were not the same as the primary's."
        )
        self._replication_seconds = metrics.histogram(
            "shardlane_shard_replication_seconds", "From a whole sum to the word of another shard that it has it."
        )
        self._publish_seconds = metrics.histogram(
            "shardlane_shard_publish_seconds", "From a chunk's whole sum to the version that it makes."
        )
        self._closed: dict[ChunkId, tuple[Step, float]] = {}  # a chunk's newest whole sum, and when
        self.apply_seconds = metrics.histogram("shardlane_shard_apply_seconds", "One chunk's optimizer step.")

    def note(self, decision: Decision) -> None:
        """A step was decided."""
        self.skipped_steps.inc(decision.skipped)
        self.refused_turns.inc(decision.refused)
        if decision.turn is not None:
            self.staleness.observe(decision.turn.staleness)

    def watch(self, shard: Shard) -> None:
        gauge = self._metrics.gauge
        gauge("shardlane_shard_version", "Oldest version among the chunks published here.").set_function(
            lambda: shard.publications.oldest()
        )
        gauge("shardlane_shard_waiting_pulls", "Pulls that wait for a version.").set_function(
            lambda: shard.publications.num_waiting
        )
        gauge("shardlane_shard_sum_bytes", "Partial and whole sums held.").set_function(lambda: shard.store.num_sum_bytes)
        gauge("shardlane_shard_outbox_bytes", "Sums and chunks that wait to be sent to other shards.").set_function(
            lambda: shard.num_outbox_bytes
        )
        chunks = gauge("shardlane_shard_chunks", "Chunks held, by what this shard is to them in the plan.", ("role",))
        for role in ("primary", "backup", "learner"):
            chunks.labels(role).set_function(partial(_count, shard, role))

    def closed(self, chunk: ChunkId, step: Step) -> None:
        """A primary has the whole sum. This and the next two are called under the shard's lock."""
        self._closed[chunk] = step, time.perf_counter()

    def acknowledged(self, chunks: Iterable[ChunkId], step: Step) -> None:
        for chunk in chunks:
            if (seconds := self._since_closed(chunk, step)) is not None:
                self._replication_seconds.observe(seconds)

    def published(self, chunk: ChunkId, version: Version) -> None:
        if (seconds := self._since_closed(chunk, Step(version - 1))) is not None:
            self._publish_seconds.observe(seconds)
            del self._closed[chunk]  # a later plan publishes it again

    def _since_closed(self, chunk: ChunkId, step: Step) -> float | None:
        closed_step, seconds = self._closed.get(chunk, (None, 0.0))
        return time.perf_counter() - seconds if closed_step == step else None


def _count(shard: Shard, role: str) -> float:
    plan, held = shard.plan, list(shard.store.chunks)
    if plan is None:
        return 0

    def role_of(chunk: ChunkId) -> str:
        placement = plan.placements[chunk]
        return "primary" if placement.primary == shard.me else "backup" if shard.me in placement.in_sync else "learner"

    return sum(role_of(chunk) == role for chunk in held)
