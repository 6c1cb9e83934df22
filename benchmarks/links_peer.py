"""The peer of the links benchmark: DistributedDataParallel over gloo, a replica a machine; our model, windows and optimizer.

`python -m benchmarks.links_peer RANK CONFIG DATA ADDRESS PORT`; rank 0 is asked for steps and answers with seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pipeline_peer import build_optimizer, build_stage, clip, follow, run_rank0
from shardlane.config import Config, load
from shardlane.data import TokenFile, open_token_folder
from shardlane.lane_compute import inputs_of, micro_batches_of, run_stage, targets_of, training_windows
from shardlane.model import Stage, whole_model

NUM_REPLICAS = 2


class Loss(nn.Module):
    """The sum of token losses of a micro-batch: DDP wants one forward pass that ends in what is differentiated."""

    def __init__(self, stage: Stage, config: Config) -> None:
        super().__init__()
        self.stage = stage
        self._precision = config.numerics.precision

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return run_stage(self.stage, x, self._precision, targets)


def data_parallel(config: Config, tokens: TokenFile, rank: int) -> Callable[[int], None]:
    """One step: this replica's micro-batches add up, and gradients are averaged during the backward pass of the last."""
    device = torch.device("cpu")
    stage = build_stage(config, whole_model(config.model), device)
    optimizer = build_optimizer(config, stage)
    model = DistributedDataParallel(Loss(stage, config))
    mine = list(micro_batches_of(rank, config.train))
    num_tokens = config.train.global_batch_size * config.train.seq_len

    def step(index: int) -> None:
        for micro_batch in mine:
            windows = training_windows(tokens, config, step=index, micro_batch=micro_batch)
            with nullcontext() if micro_batch == mine[-1] else model.no_sync():
                loss = model(inputs_of(windows, device), targets_of(windows, device))
                (loss * NUM_REPLICAS / num_tokens).backward()
        clip(list(stage.parameters()), config.optimizer.max_grad_norm, across=False)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(rank_text: str, config_file: str, data: str, address: str, port: str) -> None:
    rank, config = int(rank_text), load(config_file)
    torch.set_num_threads(config.numerics.threads)
    tokens = open_token_folder(Path(data), model_vocab_size=config.model.vocab_size, verify=False).train
    where = f"tcp://{address}:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=NUM_REPLICAS, timeout=timedelta(minutes=5))
    step = data_parallel(config, tokens, rank)
    if rank == 0:
        run_rank0(step, lambda steps: dist.broadcast(torch.tensor([steps]), 0))
        dist.broadcast(torch.tensor([-1]), 0)
    else:
        follow(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
