"""What a lane computes for one micro-batch: the same calls of the same shapes in the reference and in every worker.

A GEMM of another shape, or another order of additions, may give other bits (DESIGN.md, section 8). Whoever trains calls these.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shardlane.config import Config
from shardlane.data import TokenFile
from shardlane.model import IGNORED_TARGET, Stage, autocast, token_loss_sum
from shardlane.samples import held_out_ids, sample_ids
from shardlane.train_config import TrainConfig


def micro_batches_of(lane: int, train: TrainConfig) -> range:
    """The micro-batches that `lane` owns in every step, in the order in which they add up."""
    per_lane = train.num_micro_batches // train.lanes
    return range(lane * per_lane, (lane + 1) * per_lane)


def training_windows(tokens: TokenFile, config: Config, *, step: int, micro_batch: int) -> Tensor:
    """Micro-batch (t, m): int64 [B, T + 1]."""
    train = config.train
    ids = sample_ids(
        step,
        micro_batch,
        num_windows=tokens.num_windows(train.seq_len),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
    )
    return tokens.windows(ids, train.seq_len)


def held_out_windows(tokens: TokenFile, config: Config, *, index: int) -> Tensor:
    """Validation micro-batch `index`: int64 [B, T + 1]."""
    train = config.train
    ids = held_out_ids(index, num_windows=tokens.num_windows(train.seq_len), micro_batch_size=train.micro_batch_size)
    return tokens.windows(ids, train.seq_len)


def inputs_of(windows: Tensor, device: torch.device | str) -> Tensor:
    """What the first stage reads: int64 [B, T], in memory of its own."""
    return windows[:, :-1].contiguous().to(device)


def targets_of(windows: Tensor, device: torch.device | str) -> Tensor:
    """What the last stage is to predict: int64 [B, T], in memory of its own."""
    return windows[:, 1:].contiguous().to(device)


def count_targets(targets: Tensor) -> int:
    """The tokens that count in the loss."""
    return int(torch.count_nonzero(targets != IGNORED_TARGET))


def run_stage(stage: Stage, x: Tensor, precision: Literal["fp32", "bf16"], targets: Tensor | None = None) -> Tensor:
    """One forward pass of a micro-batch: hidden states [B, T, H]; of a last stage, given `targets`, the token losses' sum []."""
    with autocast(precision, x.device.type):
        out: Tensor = stage(x)
        return out if targets is None else token_loss_sum(out, targets)


def take_gradient(leaf: Tensor) -> Tensor:
    """Moves a lane's gradient out of a leaf, which then has none: the next lane's first addend is not added to zeros."""
    gradient = leaf.grad
    if gradient is None:
        raise ValueError(f"no backward pass has reached this leaf of shape {tuple(leaf.shape)}")
    leaf.grad = None
    return gradient
