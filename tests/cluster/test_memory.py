"""Who holds how much: nothing grows while a run goes on, and nobody but `reference` holds the whole model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shardlane.config import load
from shardlane.partition import Layout, layer_costs, split_layers
from shardlane.prepare import ensure_prepared
from tests.cluster.test_processes import TINY, is_running, pids_with_parent_variable
from tests.cluster.threads import rows_of, running
from worker_service.stage import StageCompute

MIB = 1 << 20
GROWTH_BYTES_MAX = 12 * MIB  # over 350 steps; a leak of one step's gradients would be 350 times 1 MiB
PAGE_BYTES = 4096


def resident_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.long
@pytest.mark.timeout(240)
def test_nothing_grows_over_500_steps(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardlane.cli", "local", str(TINY), "--run-dir", str(tmp_path), "--stages", "2"]
    command += ["--train.max_steps", "500", "--validation.every_steps", "50", "--train.seq_len", "8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        early: dict[int, int] = {}
        late: dict[int, int] = {}
        end = time.monotonic() + 220
        while process.poll() is None:
            assert time.monotonic() < end, "too slow"
            steps = len(rows_of(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
            for pid in pids_with_parent_variable(process.pid) if steps >= 150 else []:
                if is_running(pid):
                    late[pid] = resident_bytes(pid)
                    early.setdefault(pid, late[pid])
            time.sleep(0.5)
    finally:
        process.kill()
    assert process.returncode == 0
    assert len(early) == 4
    grown = {pid: (late[pid] - early[pid]) / MIB for pid in early}
    assert max(grown.values()) < GROWTH_BYTES_MAX / MIB, grown


def test_nobody_holds_the_whole_model(tmp_path: Path) -> None:
    shape = ["--cluster.stages", "2", "--cluster.shards", "2", "--cluster.replication", "1"]
    config = load(TINY, ["--train.max_steps", "1", *shape])
    ensure_prepared(config, tmp_path, lambda line: None)
    config = config.with_changes({"data.path": str(tmp_path / "data")})
    whole = Layout.of(config).num_parameters
    with running(config, tmp_path) as cluster:
        cluster.wait()
        for shard in cluster.shards:
            held = sum(stored.optimizer.parameter.numel() for stored in shard.shard.store.chunks.values())
            assert 0.4 * whole < held < 0.6 * whole
    for layers in split_layers(layer_costs(config.model, config.train.seq_len), 2):
        stage = StageCompute(config, layers, torch.device("cpu"), lambda name, block, values: None)
        assert sum(values.numel() for values in stage.flat_parameters.values()) < 0.7 * whole
