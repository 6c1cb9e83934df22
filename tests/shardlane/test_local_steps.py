"""Local steps: an optimizer of their own, how far the lane has come, and no trace left behind."""

from __future__ import annotations

import pytest
import torch

from shardlane.config import Config, ConfigError, build
from shardlane.local_steps import LocalSteps
from shardlane.rates import learning_rate, update_rate

NUM_TOKENS = 32


def config(**inner: object) -> Config:
    return build(
        {
            "model": {"preset": "tiny"},
            "train": {"lanes": 2, "micro_batch_size": 1, "global_batch_size": 6, "max_steps": 5, "seq_len": 8, "local_steps": 3},
            "optimizer": {"name": "nesterov", "learning_rate": 0.7},
            "inner": {"learning_rate": 0.01, **inner},
            "schedule": {"name": "linear", "warmup_steps": 2},
        }
    )


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_lane_comes_as_far_as_torchs_own_optimizer(name: str) -> None:
    chosen = config(name=name, weight_decay=0.1)
    start = {"matrix": torch.randn(40), "norm": torch.ones(8)}
    parameters = {key: each.clone() for key, each in start.items()}
    local = LocalSteps(chosen, parameters, {"matrix": True, "norm": False})
    for _ in range(2):  # the second lane begins as afresh as the first
        theirs = {key: each.clone().requires_grad_() for key, each in start.items()}
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
        extra = {"betas": (0.9, 0.95), "eps": 1e-8} if name == "adamw" else {}
        groups = [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=1.0, **extra)  # type: ignore[arg-type]
        for index in range(3):
            gradients = {key: torch.randn_like(each) for key, each in start.items()}
            rate = learning_rate(4 * 3 + index, optimizer=chosen.inner, schedule=chosen.schedule, max_steps=15)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for key, each in theirs.items():
                each.grad = gradients[key] / NUM_TOKENS
            optimizer.step()
            assert not local.is_lane_done
            local.step(4, gradients, NUM_TOKENS)
        assert local.is_lane_done
        come = local.take(3 * NUM_TOKENS)
        for key, each in theirs.items():
            assert torch.allclose(come[key], (start[key] - each.detach()) * 3 * NUM_TOKENS, atol=1e-4)
            assert torch.equal(parameters[key], start[key])


def test_a_lane_that_is_abandoned_leaves_no_trace() -> None:
    start = torch.randn(16)
    parameters = {"matrix": start.clone()}
    local = LocalSteps(config(), parameters, {"matrix": True})
    local.step(0, {"matrix": torch.randn(16)}, NUM_TOKENS)
    assert not torch.equal(parameters["matrix"], start)
    local.restore()
    assert torch.equal(parameters["matrix"], start)
    parameters["matrix"].fill_(2.0)  # the next version
    local.restore()
    assert torch.equal(parameters["matrix"], torch.full((16,), 2.0))


def test_the_schedule_is_the_local_steps_and_the_shards_rate_is_constant() -> None:
    assert [update_rate(step, config()) for step in range(5)] == [0.7] * 5
    plain = config().with_changes({"train.local_steps": 1})
    assert len({update_rate(step, plain) for step in range(2, 5)}) == 3


def test_micro_batches_must_be_shared_evenly() -> None:
    with pytest.raises(ConfigError, match="3 micro-batches a step cannot be shared among 2 local steps"):
        config().with_changes({"train.local_steps": 2})
