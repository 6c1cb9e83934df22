"""What services count while a cluster trains is what happened."""

from __future__ import annotations

from pathlib import Path

from shardlane import config as configs
from shardlane.partition import Layout
from shardlane.prepare import ensure_prepared
from tests.cluster.threads import running

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SHAPE = ["--cluster.stages", "2", "--cluster.replicas", "1", "--cluster.shards", "2", "--validation.num_micro_batches", "0"]


def test_shards_time_every_chunk_and_workers_say_where_they_sit(tmp_path: Path) -> None:
    steps = 4
    config = configs.load(TINY, [*SHAPE, "--train.max_steps", str(steps)])
    num_chunks = len(Layout.of(config).chunks)
    ensure_prepared(config, tmp_path, lambda line: None)
    with running(config, tmp_path) as cluster:
        cluster.wait()
        shards = [each.metrics.registry for each in cluster.shards]
        workers = [each.metrics.registry for each in cluster.workers]

        def total(name: str, **labels: str) -> float:
            return sum(each.get_sample_value(f"shardlane_shard_{name}", labels) or 0.0 for each in shards)

        held = {role: total("chunks", role=role) for role in ("primary", "backup", "learner")}
        assert total("replication_seconds_count") > 0 and sum(held.values()) == sum(
            len(each.shard.store.chunks) for each in cluster.shards
        )
        plan = cluster.coordinator.coordinator.plan
        assert plan is not None
        if plan.number.epoch == 1:  # a machine so busy that somebody seems dead makes another plan
            # A chunk is published once a step by its primary, after its one backup's word.
            assert total("publish_seconds_count") == total("replication_seconds_count") == steps * num_chunks
            assert total("replication_seconds_sum") <= total("publish_seconds_sum")
            assert held == {"primary": num_chunks, "backup": num_chunks, "learner": 0}
        assert total("digest_mismatches_total") == 0
        seats = [
            (sample.labels["replica"], sample.labels["stage"])
            for each in workers
            for family in each.collect()
            if family.name == "shardlane_worker_seat_info"
            for sample in family.samples
        ]
        assert seats == [("0", "0"), ("0", "1")]
        cluster.workers[0].instruments.sit(None)
        assert workers[0].get_sample_value("shardlane_worker_seat_info", {"replica": "0", "stage": "0"}) is None
