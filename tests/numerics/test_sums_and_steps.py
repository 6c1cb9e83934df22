"""The rows of the numerics contract (DESIGN.md, section 8) about sums, norms and updates, each bit for bit."""

from __future__ import annotations

import itertools
import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardlane.config import OptimizerConfig, ScheduleConfig
from shardlane.lane_compute import take_gradient
from shardlane.lane_sums import LaneSums
from shardlane.lanes import Block, lane
from shardlane.numerics import configure_torch, fast_digest, numerics_class, square_sum
from shardlane.optimizers import ChunkOptimizer
from shardlane.partition import Layout
from shardlane.rates import clip_scale, learning_rate, sum_of_norms, tree_sum
from tests.numerics.toy import toy_config


@pytest.fixture(autouse=True)
def _configured() -> None:
    configure_torch(toy_config().numerics)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


def moved(values: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements into its memory."""
    return torch.empty(values.numel() + offset)[offset:].copy_(values)


def test_the_first_addend_is_copied_so_minus_zero_stays() -> None:
    minus = torch.tensor([-0.0, 1.0])
    assert bits(torch.zeros(2) + minus) != bits(minus), "a zeroed buffer would lose the sign"
    sums = LaneSums(2)
    given = minus.clone()
    sums.add(lane(0), given)
    sums.add(lane(1), torch.tensor([-0.0, 2.0]))
    total = sums.take(Block(lane(0).first, 2))
    assert bits(total) == bits(torch.tensor([-0.0, 3.0]))
    assert total.data_ptr() == given.data_ptr(), "moved, not copied"

    leaf = nn.Parameter(torch.ones(2))
    for _ in range(2):  # the second lane begins with no gradient, not with zeros
        (leaf * minus).sum().backward()
        assert bits(take_gradient(leaf)) == bits(minus) and leaf.grad is None
    with pytest.raises(ValueError, match="no backward pass"):
        take_gradient(leaf)


def test_lanes_add_up_along_the_tree_in_whatever_order_they_arrive() -> None:
    lanes = [draw(64, seed=index) * 10.0**index for index in range(4)]
    tree = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    assert bits(tree) != bits(((lanes[0] + lanes[1]) + lanes[2]) + lanes[3]), "these numbers tell a tree from a chain"
    for order in itertools.permutations(range(4)):
        sums = LaneSums(4)
        for index in order:
            sums.add(lane(index), lanes[index].clone())
        assert bits(sums.take(Block(lane(0).first, 4))) == bits(tree)
        assert sums.blocks == []


def test_blocks_join_like_their_lanes() -> None:
    lanes = [draw(64, seed=index) for index in range(8)]
    whole, arriving, replica = LaneSums(8), LaneSums(8), LaneSums(8)
    for index, values in enumerate(lanes):
        whole.add(lane(index), values.clone())
    for index in (4, 5, 6, 7):
        replica.add(lane(index), lanes[index].clone())
    upper = Block(lane(4).first, 4)
    assert replica.blocks == [upper]
    for index in (3, 1):
        arriving.add(lane(index), lanes[index].clone())
    arriving.add(upper, replica.take(upper))
    assert [str(block) for block in arriving.blocks] == ["1", "3", "4..7"]
    for index in (0, 2):
        arriving.add(lane(index), lanes[index].clone())
    root = Block(lane(0).first, 8)
    assert bits(arriving.take(root)) == bits(whole.take(root))
    with pytest.raises(KeyError):
        arriving.take(root)


def test_losses_add_up_along_the_same_tree() -> None:
    losses = [random.Random(index).uniform(1, 1e6) for index in range(8)]
    sums = LaneSums(8)
    for index, loss in enumerate(losses):
        sums.add(lane(index), torch.tensor(loss, dtype=torch.float64))
    assert sums.take(Block(lane(0).first, 8)).item() == tree_sum(losses)


@pytest.mark.parametrize("preset", ["tiny", "demo", "20m", "llama-3.2-1b", "llama-3-8b"])
def test_chunk_borders_are_whole_vectors_fixed_by_the_config(preset: str) -> None:
    """64 bytes: the widest vector. Only the last chunk of a tensor may have a tail, as the whole tensor has."""
    config = toy_config(**{"model": {"preset": preset}, "numerics.chunk_bytes": 4 << 20})
    layout = Layout.of(config)
    for chunk in layout.chunks:
        end = chunk.offset + chunk.num_elements
        assert chunk.offset % 16 == 0 and (end % 16 == 0 or end == layout.tensors[chunk.tensor].num_elements)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_one_fused_call_over_one_tensor_a_chunk(name: str, offset: int) -> None:
    """Chunks with the borders that a config gives add up to the fused step of the whole, wherever their memory begins."""
    config = OptimizerConfig.model_validate({"name": name})
    size, most = 10_007, 2048
    start, *gradients = draw(4, size)
    whole = ChunkOptimizer(config, start.clone(), decay=True)
    starts = range(0, size, most)
    parts = [ChunkOptimizer(config, moved(start[first : first + most], offset), decay=True) for first in starts]
    for gradient in gradients:
        whole.apply(gradient.clone(), scale=0.3, learning_rate=1e-2)
        for first, part in zip(starts, parts, strict=True):
            part.apply(moved(gradient[first : first + most], offset), scale=0.3, learning_rate=1e-2)
    assert bits(torch.cat([part.parameter for part in parts])) == bits(whole.parameter)
    for state, values in whole.states().items():
        assert bits(torch.cat([part.states()[state] for part in parts])) == bits(values)
    fused = whole._optimizer.param_groups[0]
    assert fused["fused"] is True and len(fused["params"]) == 1


def test_square_sum_is_in_double_and_the_same_wherever_the_values_begin() -> None:
    """Threads: test_threads. Shape is no matter either."""
    for size in (1, 7, 333, 32_768, 32_769, 100_003):
        values = draw(size, seed=size)
        exact = float(sum(Fraction(value) ** 2 for value in values.tolist()))
        found = {square_sum(moved(values, offset)) for offset in range(16)}
        assert len(found) == 1 and found.pop() == pytest.approx(exact, rel=1e-14)
    assert square_sum(draw(12, 5)) == square_sum(draw(12, 5).flatten())
    assert square_sum(torch.empty(0)) == 0.0
    assert square_sum(torch.full((3,), 3e38)) == pytest.approx(27e76, rel=1e-6), "fp32 would overflow"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_square_sum_shows_what_is_not_finite(bad: float) -> None:
    values = draw(40_000)
    values[[5, 39_999]] = bad
    assert not math.isfinite(square_sum(values))


def test_the_norm_cannot_depend_on_the_placement_of_chunks() -> None:
    squares = [random.Random(index).lognormvariate(0, 10) for index in range(200)]
    shuffled = [random.Random(seed).sample(squares, len(squares)) for seed in range(50)]
    assert len({sum_of_norms(order) for order in shuffled}) == 1
    assert len({math.fsum([sum(order[:100]), sum(order[100:])]) for order in shuffled}) > 1, "regrouped partial sums differ"
    assert len({clip_scale(order, 4096, 1.0) for order in shuffled}) == 1


def test_the_learning_rate_is_of_the_integer_step_in_double() -> None:
    optimizer, schedule = OptimizerConfig(learning_rate=3e-3), ScheduleConfig(name="cosine", warmup_steps=7)
    steps = list(range(1000))
    forwards = [learning_rate(step, optimizer=optimizer, schedule=schedule, max_steps=1000) for step in steps]
    backwards = [learning_rate(step, optimizer=optimizer, schedule=schedule, max_steps=1000) for step in reversed(steps)]
    assert forwards == backwards[::-1], "no state"
    assert any(struct.unpack("f", struct.pack("f", rate))[0] != rate for rate in forwards), "never rounded to fp32"


def test_the_optimizer_is_given_the_rate_in_double_and_counts_in_integers() -> None:
    """Adam's bias corrections of step 2,000,001 are those of that integer: against the paper's formulas in double."""
    config = OptimizerConfig(name="adam", beta2=0.9999999, eps=1e-30)
    optimizer = ChunkOptimizer(config, torch.zeros(8), decay=False)
    optimizer.load({"exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}, 2_000_000)
    optimizer.apply(torch.ones(8), scale=1.0, learning_rate=(rate := 0.1 + 2**-40))
    assert optimizer._optimizer.param_groups[0]["lr"] == rate
    assert optimizer.num_steps == 2_000_001
    step = rate * math.sqrt(1 - 0.9999999**2_000_001) / (1 - 0.9**2_000_001)
    np.testing.assert_allclose(optimizer.parameter.numpy(), -step, rtol=3e-7)


def test_digests_see_every_bit_and_not_the_alignment() -> None:
    values = draw(1000)
    assert len({fast_digest(moved(values, offset)) for offset in range(4)}) == 1
    other = values.clone()
    other.view(torch.int32)[999] ^= 1
    assert fast_digest(other) != fast_digest(values)
    assert fast_digest(torch.zeros(1)) != fast_digest(torch.tensor([-0.0]))
    assert fast_digest(draw(4, 6).t()) != fast_digest(draw(4, 6)), "row-major order of what it is, not of its memory"
    assert fast_digest(values.bfloat16()) != fast_digest(values.half())


def test_algorithms_are_deterministic_and_tf32_is_fixed() -> None:
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark


def test_threads_are_pinned_in_a_process_that_began_with_others() -> None:
    torch.set_num_threads(2)
    configure_torch(toy_config().numerics)
    assert torch.get_num_threads() == 1


def test_the_numerics_class_names_all_that_may_change_a_bit() -> None:
    numerics = toy_config().numerics
    found = numerics_class(numerics)
    assert torch.__version__ in found and torch.backends.cpu.get_cpu_capability() in found
    others = {numerics_class(numerics.model_copy(update=change)) for change in ({"threads": 2}, {"precision": "bf16"})}
    assert len(others | {found}) == 3
