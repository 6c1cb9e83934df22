"""A chunk's optimizer against torch's own unfused one, in double, and against itself stopped and loaded."""

from __future__ import annotations

import pytest
import torch

from shardlane.config import OptimizerConfig
from shardlane.optimizers import ChunkOptimizer
from shardlane.partition import OPTIMIZER_STATES

NAMES = ["sgd", "momentum", "adam", "adamw"]
SIZE = 333
SCALE = 0.125


def config(name: str) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": name, "weight_decay": 0.1})


def draw(*seeds: int) -> list[torch.Tensor]:
    return [torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def plain(name: str, parameter: torch.Tensor, decay: bool) -> torch.optim.Optimizer:
    """torch's loop implementation in double, with the settings of `config`."""
    weight_decay = 0.1 if decay else 0.0
    match name:
        case "adam":
            return torch.optim.Adam([parameter], betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False)
        case "adamw":
            return torch.optim.AdamW([parameter], betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False)
        case _:
            momentum = 0.9 if name == "momentum" else 0.0
            return torch.optim.SGD([parameter], momentum=momentum, weight_decay=weight_decay, foreach=False)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_optimizer_it_says(name: str, decay: bool) -> None:
    start, *gradients = draw(*range(6))
    ours = ChunkOptimizer(config(name), start.clone(), decay=decay)
    theirs = start.double()
    optimizer = plain(name, theirs, decay)
    for step, gradient in enumerate(gradients):
        ours.apply(gradient.clone(), scale=SCALE, learning_rate=0.01 / (step + 1))
        theirs.grad = gradient.double() * SCALE
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.step()
    torch.testing.assert_close(ours.parameter.double(), theirs, rtol=1e-5, atol=1e-6)
    assert ours.num_steps == 5
    for state, values in ours.states().items():
        torch.testing.assert_close(values.double(), optimizer.state[theirs][state], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_loading_goes_on_bit_for_bit(name: str, num_before: int) -> None:
    start, *gradients = draw(*range(6))
    whole = ChunkOptimizer(config(name), start.clone(), decay=True)
    for gradient in gradients[:num_before]:
        whole.apply(gradient.clone(), scale=SCALE, learning_rate=0.01)
    loaded = ChunkOptimizer(config(name), whole.parameter.clone(), decay=True)
    loaded.load(whole.states(), whole.num_steps)
    for gradient in gradients[num_before:]:
        for each in (whole, loaded):
            each.apply(gradient.clone(), scale=SCALE, learning_rate=0.01)
    assert torch.equal(whole.parameter, loaded.parameter)
    assert whole.num_steps == loaded.num_steps == 5
    for state, values in whole.states().items():
        assert torch.equal(values, loaded.states()[state])


@pytest.mark.parametrize("name", NAMES)
def test_states_have_their_names_and_begin_at_zero(name: str) -> None:
    states = ChunkOptimizer(config(name), torch.ones(SIZE), decay=True).states()
    assert tuple(states) == OPTIMIZER_STATES[name]
    assert all(not values.any() and values.shape == (SIZE,) and values.dtype == torch.float32 for values in states.values())


def test_loaded_states_are_copies() -> None:
    optimizer = ChunkOptimizer(config("adamw"), torch.ones(SIZE), decay=True)
    states = {name: torch.ones(SIZE) for name in OPTIMIZER_STATES["adamw"]}
    optimizer.load(states, 1)
    optimizer.apply(torch.ones(SIZE), scale=1.0, learning_rate=0.1)
    assert all((values == 1).all() for values in states.values())


def test_what_does_not_fit_is_refused() -> None:
    optimizer = ChunkOptimizer(config("momentum"), torch.ones(SIZE), decay=True)
    for states in ({}, {"exp_avg": torch.ones(SIZE)}, {"momentum_buffer": torch.ones(SIZE - 1)}):
        with pytest.raises(ValueError, match="do not fit"):
            optimizer.load(states, 1)
    with pytest.raises(ValueError, match="flat fp32"):
        ChunkOptimizer(config("sgd"), torch.ones(2, 2), decay=True)
