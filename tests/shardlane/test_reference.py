"""The oracle itself: that it learns, pauses, skips and validates without a trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.digest import checkpoint_digest
from shardlane.errors import CheckpointError, DataError
from shardlane.ids import Version
from shardlane.manifest import newest_complete
from shardlane.reference import Reference, Row
from tests.numerics.toy import toy_config, toy_tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    return toy_tokens(tmp_path_factory.mktemp("toy") / "data")


def run(config: Config, tokens: TokenFolder, checkpoints: Path | None = None) -> tuple[list[Row], str]:
    """Rows without what the clock says, and the digest."""
    reference = Reference(config, tokens)
    rows = [timeless(row) for row in reference.run(checkpoints)]
    return rows, reference.digest()


def timeless(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "tokens_per_second"}


def test_a_run_learns_and_says_what_it_did(tokens: TokenFolder) -> None:
    config = toy_config(**{"train.max_steps": 30})
    rows = list(Reference(config, tokens).run())
    training, validation = rows[:-1], rows[-1]
    assert [row["step"] for row in training] == list(range(30))
    assert set(training[0]) == {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second"}
    assert training[0]["tokens"] == 16 * 16
    assert training[0]["loss"] == pytest.approx(math.log(101), rel=0.1)
    assert training[-1]["loss"] < 0.75 * training[0]["loss"]
    assert set(validation) == {"step", "val_loss"} and validation["step"] == 30
    assert validation["val_loss"] < training[0]["loss"]


def test_two_runs_agree_and_another_seed_does_not(tokens: TokenFolder) -> None:
    assert run(toy_config(), tokens) == run(toy_config(), tokens)
    assert run(toy_config(), tokens)[1] != run(toy_config(**{"train.seed": 1}), tokens)[1]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_pause_leaves_no_trace(tokens: TokenFolder, tmp_path: Path, optimizer: str, tied: bool) -> None:
    config = toy_config(**{"optimizer.name": optimizer, "model.tie_word_embeddings": tied})
    rows, digest = run(config, tokens)

    first_rows, paused_digest = run(config.with_changes({"train.stop_at_step": 3}), tokens, tmp_path)
    folder = newest_complete(tmp_path)
    assert folder is not None and checkpoint_digest(folder) == paused_digest != digest
    second = Reference(config, tokens)
    second.resume(folder)
    assert second.version == 3
    assert first_rows + [timeless(row) for row in second.run(tmp_path)] == rows
    assert second.digest() == digest
    last = newest_complete(tmp_path)
    assert last is not None and last != folder and checkpoint_digest(last) == digest


def test_validation_cadence_cannot_change_the_digest(tokens: TokenFolder) -> None:
    never, never_digest = run(toy_config(**{"validation.num_micro_batches": 0}), tokens)
    often, often_digest = run(toy_config(**{"validation.every_steps": 2}), tokens)
    assert never_digest == often_digest
    assert [row for row in often if "loss" in row] == never
    assert [row["step"] for row in often if "val_loss" in row] == [2, 4, 6]


def test_a_step_that_is_not_finite_is_skipped(tokens: TokenFolder) -> None:
    config = toy_config(**{"optimizer.name": "sgd", "optimizer.max_grad_norm": 0.0, "schedule.name": "constant"})
    reference = Reference(config.with_changes({"optimizer.learning_rate": 1e30}), tokens)
    rows = reference.run()
    assert math.isfinite(next(rows)["loss"])
    wrecked = reference.digest()
    for _ in range(2):
        row = next(rows)
        assert not math.isfinite(row["grad_norm"]) and row["lr"] == 1e30
        assert reference.digest() == wrecked
    assert reference.version >= 2 and reference.optimizer_step == 1


def test_lanes_change_bits_and_nothing_else(tokens: TokenFolder) -> None:
    four, four_digest = run(toy_config(), tokens)
    one, one_digest = run(toy_config(**{"train.lanes": 1}), tokens)
    assert four_digest != one_digest
    for a, b in zip(four, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_all_sites_of_a_tied_tensor_are_counted(tokens: TokenFolder) -> None:
    """Finite differences of the first step's loss along the gradient of a tied embedding, which sgd subtracts."""
    config = toy_config(**{
        "model.tie_word_embeddings": True, "optimizer.name": "sgd", "optimizer.max_grad_norm": 0.0, "optimizer.weight_decay": 0.0,
        "optimizer.learning_rate": 1e-4, "schedule.name": "constant",
    })  # fmt: skip
    reference = Reference(config, tokens)
    rows = reference.run()
    before = next(rows)
    again = Reference(config, tokens)
    again._chunks = reference._chunks  # version 1's weights under step 0's samples
    again._filled = Version(-1)
    after = again._train_step(0)
    assert before["loss"] - after["loss"] == pytest.approx(1e-4 * before["grad_norm"] ** 2, rel=0.05)


def test_other_mathematics_or_data_is_refused(tokens: TokenFolder, tmp_path: Path) -> None:
    run(toy_config(**{"train.stop_at_step": 1}), tokens, tmp_path / "checkpoints")
    folder = newest_complete(tmp_path / "checkpoints")
    assert folder is not None
    with pytest.raises(CheckpointError, match=r"optimizer\.beta1 was 0\.9 and is now 0\.8"):
        Reference(toy_config(**{"optimizer.beta1": 0.8}), tokens).resume(folder)
    with pytest.raises(CheckpointError, match="data hash"):
        Reference(toy_config(), toy_tokens(tmp_path / "other", seed=8)).resume(folder)
    Reference(toy_config(**{"optimizer.beta1": 0.8}), tokens).resume(folder, fork=True)


def test_too_little_text_is_said_at_once(tokens: TokenFolder) -> None:
    with pytest.raises(DataError, match=r"held_out.*seq_len 1000"):
        Reference(toy_config(**{"train.seq_len": 1000}), tokens)


def test_threads_are_the_config_s(tokens: TokenFolder) -> None:
    Reference(toy_config(), tokens)
    assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
