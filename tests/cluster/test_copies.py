"""Copies of a chunk are the same, bit for bit; one that is not is found, and filled again while training goes on."""

from __future__ import annotations

from pathlib import Path

import torch

from ps_service.core.shard import COMPARED_EVERY_STEPS
from shardlane import config as configs
from shardlane.prepare import ensure_prepared
from tests.cluster.threads import digest_of, running, train_reference

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"


def test_a_flipped_bit_in_a_backup_is_found_and_mended(tmp_path: Path) -> None:
    steps = 3 * COMPARED_EVERY_STEPS
    settings = ["--train.max_steps", str(steps), "--train.seq_len", "8", "--validation.num_micro_batches", "0"]
    config = configs.load(TINY, [*settings, "--cluster.shards", "2"])
    tokens = ensure_prepared(config, tmp_path, lambda line: None)
    config = config.with_changes({"data.path": str(tmp_path / "data")})
    with running(config, tmp_path / "run") as cluster:
        plan = cluster.coordinator.coordinator.run.plan
        while plan is None or any(shard.shard.publications.oldest() < 1 for shard in cluster.shards):
            plan = cluster.coordinator.coordinator.run.plan
        chunk = next(iter(cluster.shards[0].shard.store.chunks))
        backup = next(each for each in cluster.shards if each.me == plan.placements[chunk].in_sync[1])
        stored = backup.shard.store.chunks[chunk]
        with stored.lock:
            stored.optimizer.parameter.data.view(torch.int32)[0] ^= 1
        cluster.wait()
        registries = [each.metrics.registry for each in cluster.shards]
        alarms = [each.get_sample_value("shardlane_shard_alarms_total") for each in registries]
        mismatches = [each.get_sample_value("shardlane_shard_digest_mismatches_total") for each in registries]
        newest = cluster.coordinator.coordinator.run.plan
    assert sum(alarms) == sum(mismatches) == 1 and newest is not None and newest.number > plan.number
    assert digest_of(tmp_path / "run") == train_reference(config, tokens)[0]
