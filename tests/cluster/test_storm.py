"""A run whose calls fail after they were executed, and are executed twice: each contribution counts once all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlane import config as configs
from shardlane import rpc
from shardlane.ledger import Expected, judge
from shardlane.prepare import ensure_prepared
from tests.cluster.storm import DOUBLED, LOST, Storm
from tests.cluster.threads import comparable, rows_of, train, train_reference

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"


@pytest.mark.parametrize("seed", [1, 2])
def test_lost_answers_and_doubled_calls_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    shape = ["--cluster.stages", "2", "--cluster.replicas", "2", "--cluster.shards", "2"]
    config = configs.load(TINY, [*shape, "--train.max_steps", "10", "--validation.every_steps", "5"])
    tokens = ensure_prepared(config, tmp_path, lambda line: None)
    digest, rows = train_reference(config, tokens)
    storm = Storm(seed)
    monkeypatch.setattr(rpc, "connect", storm.connect(rpc.connect))
    assert train(config, tmp_path) == digest
    assert comparable(rows_of(tmp_path)) == comparable(rows)
    with (tmp_path / "ledger.jsonl").open("rb") as lines:
        account = judge(lines, Expected.of(config), reached=config.train.max_steps)
    assert (account.faults, account.num_steps, account.roll_backs) == ([], config.train.max_steps, [])
    for method in ("Push", "Pull", "Deliver"):
        assert storm.happened[method, LOST] and storm.happened[method, DOUBLED], (method, storm.happened)
    assert storm.happened["Transfer", LOST]
