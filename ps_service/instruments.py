"""What a shard shows on `/metrics`: instruments that read its state when they are scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ps_service.core.messages import Decision
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
        gauge("shardlane_shard_chunks", "Chunks held.").set_function(lambda: len(shard.store.chunks))
