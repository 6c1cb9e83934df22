"""One truth: whatever the cluster's shape, the run ends with the reference's digest and losses. Services as threads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from shardlane import config as configs
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.prepare import ensure_prepared
from tests.cluster.threads import comparable, digest_of, rows_of, train, train_reference

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SHAPES = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 1, 2), (4, 1, 3), (1, 4, 2)]
STEPS = 4


class Truth:
    """The reference's digest and rows for one config, worked out once."""

    def __init__(self, folder: Path) -> None:
        self.data = folder
        self.tokens: TokenFolder = ensure_prepared(self.config(), folder, lambda line: None)
        self._known: dict[bool, tuple[str, list[dict[str, Any]]]] = {}

    def config(self, *overrides: str, tied: bool = False) -> Config:
        fixed = ["--train.max_steps", str(STEPS), "--validation.every_steps", "2", "--data.path", str(self.data / "data")]
        return configs.load(TINY, [*fixed, "--model.tie_word_embeddings", str(tied).lower(), *overrides])

    def of(self, tied: bool) -> tuple[str, list[dict[str, Any]]]:
        if tied not in self._known:
            self._known[tied] = train_reference(self.config(tied=tied), self.tokens)
        return self._known[tied]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    folder = tmp_path_factory.mktemp("truth")
    config = configs.load(TINY)
    ensure_prepared(config, folder, lambda line: None)
    return Truth(folder)


def shaped(stages: int, replicas: int, shards: int) -> list[str]:
    return ["--cluster.stages", str(stages), "--cluster.replicas", str(replicas), "--cluster.shards", str(shards)]


@pytest.mark.parametrize(
    ("shape", "schedule", "tied"),
    [
        *itertools.product(SHAPES, ["1f1b", "gpipe"], [False, True]),
        ((2, 2, 2), "zero_bubble", True),
        ((4, 1, 3), "zero_bubble", False),
    ],
    ids=str,
)
def test_every_shape_ends_with_the_references_digest_and_losses(
    truth: Truth, tmp_path: Path, shape: tuple[int, int, int], schedule: str, tied: bool
) -> None:
    digest, rows = truth.of(tied)
    config = truth.config(*shaped(*shape), "--pipeline.schedule", schedule, tied=tied)
    assert train(config, tmp_path) == digest
    assert comparable(rows_of(tmp_path)) == comparable(rows)


def test_a_run_stopped_halfway_goes_on_in_another_shape(truth: Truth, tmp_path: Path) -> None:
    digest, rows = truth.of(False)
    halfway = train(truth.config(*shaped(2, 2, 2), "--train.stop_at_step", "2"), tmp_path)
    assert halfway != digest
    assert train(truth.config(*shaped(3, 1, 1), "--pipeline.schedule", "gpipe"), tmp_path) == digest
    assert comparable(rows_of(tmp_path)) == comparable(rows)
    assert digest_of(tmp_path) == digest


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_every_optimizer_and_the_other_precision(truth: Truth, tmp_path: Path, optimizer: str) -> None:
    overrides = ["--optimizer.name", optimizer, "--schedule.name", "wsd", "--schedule.decay_steps", "2"]
    overrides += ["--numerics.precision", "bf16" if optimizer == "adam" else "fp32"]
    digest, rows = train_reference(truth.config(*overrides), truth.tokens)
    assert train(truth.config(*overrides, *shaped(2, 2, 2)), tmp_path) == digest
    assert comparable(rows_of(tmp_path)) == comparable(rows)


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "int8_stochastic"])
def test_every_codec_is_as_exact_as_the_reference(truth: Truth, tmp_path: Path, codec: str) -> None:
    tied = codec in ("fp16", "int8_stochastic")
    overrides = ["--communication.push", codec, "--communication.pull", "bf16" if codec == "int8" else "fp32"]
    digest, rows = train_reference(truth.config(*overrides, tied=tied), truth.tokens)
    assert digest != truth.of(tied)[0]
    for name, shape in (("deep", (2, 2, 2)), ("wide", (1, 4, 3))):
        assert train(truth.config(*overrides, *shaped(*shape), tied=tied), tmp_path / name) == digest
        assert comparable(rows_of(tmp_path / name)) == comparable(rows)


@pytest.mark.parametrize(
    ("staleness", "warmup", "look_ahead", "codec"),
    [(1, 0, False, "fp32"), (1, 2, True, "fp32"), (2, 1, True, "int8_stochastic"), (7, 0, False, "fp32")],
)
def test_steps_from_older_versions_are_as_exact_as_the_reference(
    truth: Truth, tmp_path: Path, staleness: int, warmup: int, look_ahead: bool, codec: str
) -> None:
    steps = ["--train.max_steps", "6", "--validation.every_steps", "1"]
    overrides = [*steps, "--train.consistency", "ssp", "--train.staleness", str(staleness), "--communication.push", codec]
    overrides += ["--train.staleness_warmup_steps", str(warmup)]
    overrides += ["--train.look_ahead", str(look_ahead).lower(), "--communication.pull", "bf16" if staleness == 2 else "fp32"]
    digest, rows = train_reference(truth.config(*overrides), truth.tokens)
    for name, shape in (("deep", (2, 2, 2)), ("wide", (1, 4, 3)), ("long", (4, 1, 1))):
        assert train(truth.config(*overrides, *shaped(*shape)), tmp_path / name) == digest
        assert comparable(rows_of(tmp_path / name)) == comparable(rows)
    halfway = truth.config(*overrides, *shaped(2, 1, 2), "--train.stop_at_step", "3")
    assert train(halfway, tmp_path / "resumed") != digest
    assert train(truth.config(*overrides, *shaped(1, 2, 2)), tmp_path / "resumed") == digest


def test_a_run_begun_under_bsp_goes_on_under_ssp_alike_in_every_shape(truth: Truth, tmp_path: Path) -> None:
    """It has no versions before the one that it goes on from: they were like that one."""
    late = ["--train.consistency", "ssp", "--train.staleness", "2", "--train.look_ahead", "true"]
    digests = set()
    for name, shape in (("deep", (2, 1, 2)), ("wide", (1, 2, 1))):
        train(truth.config(*shaped(*shape), "--train.stop_at_step", "2"), tmp_path / name)
        digests.add(train(truth.config(*shaped(*shape), *late), tmp_path / name, fork=True))
    assert len(digests) == 1 and truth.of(False)[0] not in digests


def test_no_staleness_is_bsp(truth: Truth, tmp_path: Path) -> None:
    digest, rows = truth.of(False)
    assert train(truth.config(*shaped(2, 2, 2), "--train.consistency", "ssp"), tmp_path) == digest
    assert comparable(rows_of(tmp_path)) == comparable(rows)


OUTER = ["--optimizer.name", "nesterov", "--optimizer.learning_rate", "0.7", "--optimizer.weight_decay", "0"]
OUTER += ["--optimizer.max_grad_norm", "0"]


@pytest.mark.parametrize(("schedule", "codec"), [("1f1b", "fp32"), ("zero_bubble", "int8_stochastic")])
def test_local_steps_end_with_the_references_digest_and_losses(truth: Truth, tmp_path: Path, schedule: str, codec: str) -> None:
    overrides = ["--train.local_steps", "2", *OUTER, "--communication.push", codec]
    digest, rows = train_reference(truth.config(*overrides), truth.tokens)
    for name, shape in (("deep", (3, 1, 2)), ("wide", (2, 2, 1))):
        config = truth.config(*overrides, *shaped(*shape), "--pipeline.schedule", schedule)
        assert train(config, tmp_path / name) == digest
        assert comparable(rows_of(tmp_path / name)) == comparable(rows)


@pytest.mark.parametrize("codec", ["top_k", "top_k_int8"])
def test_what_is_left_out_stays_with_its_lane(truth: Truth, tmp_path: Path, codec: str) -> None:
    overrides = ["--communication.push", codec]
    digest, rows = train_reference(truth.config(*overrides), truth.tokens)
    assert train(truth.config(*overrides, *shaped(2, 1, 2)), tmp_path) == digest  # one replica: no lane moves
    assert comparable(rows_of(tmp_path)) == comparable(rows)
