"""What one step does with the gradients' norm, and at which learning rate: pure arithmetic in double, on every process the same.

The gradients that reach this page are those of the *sum* of token losses; the division by the step's tokens happens once, in
`Clip.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shardlane.config import Config, OptimizerConfig, ScheduleConfig
from shardlane.turns import Turn


def learning_rate(step: int, *, optimizer: OptimizerConfig, schedule: ScheduleConfig, max_steps: int) -> float:
    """The rate of step `step` (from 0), from the integer alone: no state, so no order of calls and no resume can change a bit.

    Warm-up reaches the peak at its last step; every decay reaches `min_ratio` of the peak exactly at step `max_steps - 1`.
    """
    peak = optimizer.learning_rate
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * ((step + 1) / warmup)
    floor = schedule.min_ratio
    match schedule.name:
        case "constant":
            return peak
        case "linear":
            return peak * (1.0 - (1.0 - floor) * _progress(step - warmup, max_steps - 1 - warmup))
        case "cosine":  # Loshchilov & Hutter 2017, equation 5, without restarts
            cosine = math.cos(math.pi * _progress(step - warmup, max_steps - 1 - warmup))
            return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + cosine))
        case "wsd":  # warm-up, stable, decay: Hu et al. 2024 (MiniCPM), section 4.2, with a linear decay
            num_into_decay = step + 1 - (max_steps - schedule.decay_steps)
            return peak if num_into_decay <= 0 else peak * (1.0 - (1.0 - floor) * _progress(num_into_decay, schedule.decay_steps))


def update_rate(step: int, config: Config) -> float:
    """The rate at which the shards update at step `step`: constant where the schedule is the local steps'."""
    if config.train.local_steps > 1:
        return config.optimizer.learning_rate
    return learning_rate(step, optimizer=config.optimizer, schedule=config.schedule, max_steps=config.train.max_steps)


def turn_rate(turn: Turn, config: Config) -> float:
    """The rate for one lane's contribution under ASP: that of the step which the lanes' clocks average to, over how old the
    version was that it was computed from (Zhang et al. 2016, "Staleness-aware async-SGD", equation 5).
    """
    rate = update_rate(turn.clock_sum // config.train.lanes, config)
    return rate / max(1, turn.staleness) if config.train.staleness_aware else rate


def _progress(done: int, span: int) -> float:
    return min(1.0, done / span) if span > 0 else 0.0


class Clip(NamedTuple):
    """What a step's norms decide."""

    grad_norm: float  # of the mean token loss, before clipping; NaN if the step has no token
    scale: float  # the one factor to multiply the summed gradients by; 0.0 if the step is skipped
    finite: bool  # False: skip the step


def sum_of_norms(square_sums: Sequence[float]) -> float:
    """The model's square norm, given those of all chunks. `math.fsum` is exact before its one rounding; never negative."""
    return math.fsum(square_sums)


def clip_scale(square_sums: Sequence[float], tokens: int, max_grad_norm: float) -> Clip:
    """Clips the global norm as `torch.nn.utils.clip_grad_norm_` does, and divides by the step's tokens in the same factor.

    `square_sums`: of each chunk's sum, in chunk order. `max_grad_norm` 0 does not clip. A step whose norm is not finite, or
    that has no token, is to be skipped.
    """
    if tokens <= 0:
        return Clip(math.nan, 0.0, False)
    grad_norm = math.sqrt(sum_of_norms(square_sums)) / tokens
    if not math.isfinite(grad_norm):
        return Clip(grad_norm, 0.0, False)
    clipped = min(1.0, max_grad_norm / (grad_norm + 1e-6)) if max_grad_norm > 0 else 1.0
    return Clip(grad_norm, clipped / tokens, True)


def tree_sum(values: Sequence[float]) -> float:
    """Adds one value a lane (a power of two of them) in double along the tree over lanes, as `LaneSums` adds tensors."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return tree_sum(values[:half]) + tree_sum(values[half:])
