"""Schedules, clipping and the tree in double."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlane.cadence import checkpoints_at, validates_at
from shardlane.config import Config, OptimizerConfig, ScheduleConfig
from shardlane.rates import clip_scale, learning_rate, sum_of_norms, tree_sum

PEAK = 3e-3


def rates(max_steps: int, **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    optimizer = OptimizerConfig(learning_rate=PEAK)
    return [learning_rate(step, optimizer=optimizer, schedule=config, max_steps=max_steps) for step in range(max_steps)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates(8, name="constant", warmup_steps=4) == [PEAK * 0.25, PEAK * 0.5, PEAK * 0.75, *[PEAK] * 5]


def test_linear_falls_evenly_to_its_floor() -> None:
    assert rates(5, name="linear", min_ratio=0.2) == pytest.approx([PEAK * share for share in (1, 0.8, 0.6, 0.4, 0.2)], rel=1e-15)


def test_cosine_is_half_way_in_the_middle() -> None:
    found = rates(13, name="cosine", warmup_steps=2, min_ratio=0.1)
    assert found[1] == found[2] == PEAK
    assert found[7] == pytest.approx(PEAK * 0.55, rel=1e-12)
    assert found[12] == pytest.approx(PEAK * 0.1, rel=1e-12)
    assert sorted(found[2:], reverse=True) == found[2:]


def test_wsd_is_stable_and_then_decays() -> None:
    found = rates(10, name="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.0)
    assert found == pytest.approx([PEAK * share for share in (0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0)], abs=1e-18)


@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.integers(1, 50),
    st.integers(0, 50),
    st.integers(0, 50),
    st.floats(0, 1),
)
def test_every_schedule_stays_between_floor_and_peak(name: str, max_steps: int, warmup: int, decay: int, floor: float) -> None:
    warmup = min(warmup, max_steps)
    found = rates(max_steps, name=name, warmup_steps=warmup, decay_steps=min(decay, max_steps - warmup), min_ratio=floor)
    assert all(0 <= rate <= PEAK * (1 + 1e-15) for rate in found)
    assert all(rate >= PEAK * floor * (1 - 1e-12) - 1e-18 for rate in found[warmup:])
    if name in ("linear", "cosine") and max_steps - warmup > 1:
        assert found[-1] == pytest.approx(PEAK * floor, rel=1e-12, abs=1e-18)


def test_a_step_beyond_the_schedule_keeps_the_last_rate() -> None:
    optimizer, schedule = OptimizerConfig(), ScheduleConfig(name="cosine")
    last, beyond = (learning_rate(step, optimizer=optimizer, schedule=schedule, max_steps=10) for step in (9, 99))
    assert last == beyond


def test_clipping_divides_once_by_the_tokens() -> None:
    clip = clip_scale([9.0, 16.0], tokens=10, max_grad_norm=0.25)
    assert clip.grad_norm == 0.5 and clip.finite
    assert clip.scale == (0.25 / (0.5 + 1e-6)) / 10


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.6])
def test_a_small_norm_is_not_clipped(max_grad_norm: float) -> None:
    assert clip_scale([9.0, 16.0], tokens=10, max_grad_norm=max_grad_norm) == (0.5, 0.1, True)


@pytest.mark.parametrize("squares", [[1.0, math.inf], [math.nan, 1.0], [math.inf, math.nan]])
def test_a_norm_that_is_not_finite_skips(squares: list[float]) -> None:
    clip = clip_scale(squares, tokens=10, max_grad_norm=1.0)
    assert not clip.finite and clip.scale == 0.0 and not math.isfinite(clip.grad_norm)


def test_a_step_without_tokens_skips() -> None:
    clip = clip_scale([0.0], tokens=0, max_grad_norm=1.0)
    assert not clip.finite and clip.scale == 0.0


def test_the_norms_are_summed_exactly() -> None:
    assert sum_of_norms([1e16, 1.0, 1.0]) == 1e16 + 2.0 != sum([1e16, 1.0, 1.0])


def test_the_tree_is_a_tree() -> None:
    values = [0.1, 0.2, 0.3, 1e16]
    assert tree_sum(values) == (0.1 + 0.2) + (0.3 + 1e16)
    assert tree_sum([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]) == ((0.1 + 0.2) + (0.3 + 0.4)) + ((0.5 + 0.6) + (0.7 + 0.8))
    assert tree_sum([0.25]) == 0.25


def cadence(**changes: object) -> Config:
    return Config().with_changes({"train.max_steps": 10, **changes})


def test_validation_comes_every_so_often_and_at_the_end() -> None:
    config = cadence(**{"validation.every_steps": 4})
    assert [v for v in range(11) if validates_at(v, config)] == [4, 8, 10]
    assert [v for v in range(11) if validates_at(v, cadence())] == [10]
    assert not any(validates_at(v, cadence(**{"validation.num_micro_batches": 0})) for v in range(11))


def test_a_pause_adds_a_checkpoint_and_no_validation() -> None:
    config = cadence(**{"train.stop_at_step": 5, "checkpoint.every_steps": 2})
    assert [v for v in range(6) if checkpoints_at(v, config)] == [2, 4, 5]
    assert not any(validates_at(v, config) for v in range(6))
