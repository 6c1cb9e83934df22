"""What a run is said to take is what it takes: of links and disk here, of memory in tests/shardlane/test_partition.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlane import config as configs
from shardlane.cli.__main__ import main
from shardlane.manifest import newest_complete
from shardlane.prepare import ensure_prepared
from shardlane.sizing import checkpoint_bytes, memory, traffic
from shardlane.storage import locate
from tests.cluster.threads import running

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
STEPS = 3


@pytest.mark.parametrize(
    ("stages", "replicas", "settings"),
    [
        (2, 1, ("--communication.touched_rows", "false")),
        (1, 2, ("--communication.push", "int8", "--communication.pull", "bf16")),
        (1, 2, ("--model.tie_word_embeddings", "true", "--communication.touched_rows", "false", "--optimizer.name", "momentum")),
    ],
)
def test_it_is_what_workers_count_and_checkpoints_weigh(
    stages: int, replicas: int, settings: tuple[str, ...], tmp_path: Path
) -> None:
    shape = ("--cluster.stages", str(stages), "--cluster.replicas", str(replicas), "--cluster.shards", "2")
    rest = ("--validation.num_micro_batches", "0", "--numerics.chunk_bytes", "65536", "--train.max_steps", str(STEPS))
    config = configs.load(TINY, [*shape, *rest, *settings])
    ensure_prepared(config, tmp_path, lambda line: None)
    with running(config, tmp_path) as cluster:
        cluster.wait()
        plan = cluster.coordinator.coordinator.plan
        assert plan is not None

        def total(name: str) -> float:
            return sum(each.metrics.registry.get_sample_value(f"shardlane_worker_{name}") or 0.0 for each in cluster.workers)

        pushed, pulled = total("pushed_bytes_total"), total("pulled_bytes_total")
    expected = traffic(config)
    # The first step under a plan goes lane by lane; and the version after the last step is asked for early.
    alone = traffic(config.with_changes({"cluster.replicas": config.train.lanes}))
    wanted = alone.pushes + (STEPS - 1) * expected.pushes
    assert pushed >= wanted and pulled >= STEPS * expected.pulls
    if plan.number.epoch == 1:  # a machine so busy that somebody seems dead has things sent again
        assert pushed == wanted and pulled <= (STEPS + 1) * expected.pulls
    newest = newest_complete(locate(str(tmp_path / "checkpoints")))
    assert newest is not None
    parts = sum(file.stat().st_size for file in Path(str(newest)).glob("*.safetensors"))
    assert checkpoint_bytes(config) < parts < 1.1 * checkpoint_bytes(config), "the names of tensors come on top"


def test_embeddings_are_taken_whole() -> None:
    """Which rows will be touched is not known before."""
    config = configs.load(TINY)
    dense = config.with_changes({"communication.touched_rows": False})
    assert traffic(config) == traffic(dense)


def test_more_of_each_costs_what_it_should() -> None:
    """Fixed by arithmetic that needs no run."""
    one = configs.load(TINY, ["--cluster.stages", "2"])
    assert traffic(one).copies == 0 and traffic(one.with_changes({"cluster.stages": 1})).activations == 0
    two = one.with_changes({"cluster.shards": 2, "cluster.replicas": 2})
    assert traffic(two).copies == memory(two).model == traffic(one).pushes
    assert traffic(two).pushes == 2 * traffic(one).pushes and traffic(two).activations == traffic(one).activations
    local = two.with_changes({"train.local_steps": 2})
    assert traffic(local).pushes == 4 * traffic(one).pushes, "lane by lane"
    turns = one.with_changes({"train.consistency": "asp"})
    assert traffic(turns).pulls == 4 * traffic(one).pulls
    assert memory(turns).shard == memory(one).shard + 4 * memory(one).model
    assert memory(two).shard == pytest.approx(memory(one).shard, rel=0.05), "half of the model each, twice"


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", str(TINY), "--stages", "2", "--replicas", "2", "--shards", "2"]) == 0
    out = capsys.readouterr().out
    assert "238,144 parameters, 1.0 MB in fp32" in out and "2 stages x 2 replicas, 2 shards, 2 copies" in out
    assert "5.0 MB a step of 512 tokens" in out and "2.9 MB; 3 are kept" in out
    assert main(["size", str(TINY), "--stages", "9"]) == 2
    assert "cluster.stages 9 is more than" in capsys.readouterr().err
