"""What the coordinator shows of its members, over a clock of this test's own."""

from __future__ import annotations

from pathlib import Path

from coordinator.core.run import Run
from coordinator.shell import Coordinator
from shardlane.metrics import Metrics
from tests.coordinator.cast import beat, registration, small_config, summary, write_token_folder


def test_comings_and_goings_are_counted_and_recoveries_timed(tmp_path: Path) -> None:
    metrics, now = Metrics("coordinator"), [0.0]

    def read(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"shardlane_coordinator_{name}", labels)

    def step(run: Run, number: int) -> None:
        coordinator.heartbeat(beat(run, "shard 1", summary(number)))

    write_token_folder(tmp_path / "data")
    config = small_config(checkpoint__every_steps=2)
    coordinator = Coordinator(config, run_dir=tmp_path, clock=lambda: now[0], metrics=metrics)
    try:
        assert read("departures_total", role="worker", reason="silent") == 0  # there before the first, for rates
        for name in ("shard 1", "shard 2", "worker 1", "worker 2", "worker 3"):
            coordinator.register(registration(name))
        assert (read("joins_total", role="shard"), read("joins_total", role="worker")) == (2, 3)
        assert (read("members_expected", role="shard"), read("members_expected", role="worker")) == (2, 2)
        assert (read("stages"), read("replicas"), read("checkpoint_interval_steps")) == (2, 1, 2)
        step(coordinator.run, 0)
        now[0] = 10.0
        coordinator.register(registration("worker 4", address=registration("worker 3").address))  # that was a spare
        step(coordinator.run, 1)
        assert read("recovery_seconds_count") == 0  # nothing to recover from
        coordinator.register(registration("worker 5", address=registration("worker 1").address))
        assert read("plans_total") == 2
        now[0] = 12.5
        step(coordinator.run, 2)
        step(coordinator.run, 3)
        assert (read("recovery_seconds_count"), read("recovery_seconds_sum")) == (1, 2.5)
        assert read("departures_total", role="worker", reason="replaced") == 2
    finally:
        coordinator.close()
