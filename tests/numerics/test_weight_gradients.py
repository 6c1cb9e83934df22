"""Weight gradients that are put off are those of autograd, whenever they are added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardlane.lane_compute import run_stage
from shardlane.model import Stage, whole_model
from tests.numerics.toy import VOCAB_SIZE, filled_stage, toy_config


def batches(config_shape: tuple[int, int], count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return torch.randint(VOCAB_SIZE, config_shape, generator=generator)

    return [(draw(), draw()) for _ in range(count)]


def gradients(stage: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in stage.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_they_are_those_of_autograd(precision: str, tolerance: float) -> None:
    config = toy_config(**{"numerics.precision": precision})
    plain = filled_stage(config, whole_model(config.model))
    split = filled_stage(config, whole_model(config.model))
    weight_gradients = split.put_off_weight_gradients()
    for x, targets in batches((config.train.micro_batch_size, config.train.seq_len), 3):
        losses = [run_stage(stage, x, config.numerics.precision, targets) for stage in (plain, split)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        weight_gradients.add_all()
    expected, found = gradients(plain), gradients(split)
    assert found.keys() == expected.keys() == dict(plain.named_parameters()).keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= tolerance * scale, name
        assert found[name].dtype == torch.float32 and not found[name].requires_grad


def test_when_they_are_added_changes_no_bit() -> None:
    config = toy_config()
    drawn = batches((config.train.micro_batch_size, config.train.seq_len), 3)

    def run(*, lag: int) -> dict[str, Tensor]:
        stage: Stage = filled_stage(config, whole_model(config.model))
        weight_gradients = stage.put_off_weight_gradients()
        late = []
        for x, targets in drawn:
            run_stage(stage, x, "fp32", targets).backward()
            late.append(weight_gradients.take())
            if len(late) > lag:
                for pending in late.pop(0):
                    pending.add()
        for each in late:
            for pending in each:
                pending.add()
        return gradients(stage)

    at_once, later = run(lag=0), run(lag=2)
    assert all(torch.equal(at_once[name], later[name]) for name in at_once)
