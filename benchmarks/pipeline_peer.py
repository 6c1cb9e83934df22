"""The peers of the pipeline benchmark, over the same model code, weights' shapes, micro-batches, optimizer and clipping.

`stage0` and `stage1`: torch.distributed.pipelining's 1F1B over gloo, a process a stage, cut where ours are cut. `plain`: one
process, one device, the whole model (gloo does not send from CUDA, and NCCL wants a device a rank).
`python -m benchmarks.pipeline_peer ROLE CONFIG DATA DEVICE PORT`; rank 0 is asked for steps and answers with seconds.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.children import serve
from shardlane.config import Config, load
from shardlane.data import TokenFile, open_token_folder
from shardlane.lane_compute import inputs_of, run_stage, targets_of, training_windows
from shardlane.model import Stage, autocast, token_loss_sum, whole_model
from shardlane.partition import StageLayers, layer_costs, split_layers

NUM_STAGES = 2


def build_stage(config: Config, layers: StageLayers, device: torch.device) -> Stage:
    """With weights drawn as the field draws them; norms begin at 1."""
    stage = Stage.empty(config.model, layers, device)
    torch.manual_seed(config.train.seed + layers.first)
    for parameter in stage.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=config.model.initializer_range)
        else:
            nn.init.ones_(parameter)
    return stage


def build_optimizer(config: Config, stage: Stage) -> torch.optim.Optimizer:
    settings = config.optimizer
    matrices = [each for each in stage.parameters() if each.dim() > 1]
    vectors = [each for each in stage.parameters() if each.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)


def micro_batches(config: Config, tokens: TokenFile, step: int) -> list[Tensor]:
    """The very windows that our workers see at `step`, each int64 [B, T + 1]."""
    return [training_windows(tokens, config, step=step, micro_batch=m) for m in range(config.train.num_micro_batches)]


class InPrecision(nn.Module):
    """A stage under the config's autocast."""

    def __init__(self, stage: Stage, config: Config) -> None:
        super().__init__()
        self.stage = stage
        self._precision = config.numerics.precision

    def forward(self, x: Tensor) -> Tensor:
        with autocast(self._precision, x.device.type):
            out: Tensor = self.stage(x)
            return out


def pipelined(config: Config, tokens: TokenFile, rank: int) -> Callable[[int], None]:
    """One step of 1F1B over gloo on the CPU."""
    device = torch.device("cpu")
    layers = split_layers(layer_costs(config.model, config.train.seq_len), NUM_STAGES)[rank]
    stage = build_stage(config, layers, device)
    optimizer = build_optimizer(config, stage)
    num_tokens = config.train.global_batch_size * config.train.seq_len

    def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return token_loss_sum(logits, targets) / num_tokens

    part = PipelineStage(InPrecision(stage, config), rank, NUM_STAGES, device)
    schedule = Schedule1F1B(part, config.train.num_micro_batches, loss_fn=mean_loss, scale_grads=False)

    def step(index: int) -> None:
        windows = torch.cat(micro_batches(config, tokens, index))
        if layers.is_first:
            schedule.step(inputs_of(windows, device))
        else:
            schedule.step(target=targets_of(windows, device), losses=[])
        clip(list(stage.parameters()), config.optimizer.max_grad_norm, across=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(config: Config, tokens: TokenFile, device: torch.device) -> Callable[[int], None]:
    """One step of ordinary PyTorch: gradients accumulate over the micro-batches."""
    stage = build_stage(config, whole_model(config.model), device)
    optimizer = build_optimizer(config, stage)
    num_tokens = config.train.global_batch_size * config.train.seq_len

    def step(index: int) -> None:
        for windows in micro_batches(config, tokens, index):
            targets = targets_of(windows, device)
            loss = run_stage(stage, inputs_of(windows, device), config.numerics.precision, targets)
            (loss / num_tokens).backward()
        clip(list(stage.parameters()), config.optimizer.max_grad_norm, across=False)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def clip(parameters: Sequence[nn.Parameter], max_norm: float, *, across: bool) -> None:
    """To the norm over all stages, as our shards clip. `across`: other ranks hold the rest of the model."""
    if not max_norm:
        return
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if across:
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def run_rank0(step: Callable[[int], None], announce: Callable[[int], None]) -> None:
    """Answers {"steps": N} with the seconds that N steps take; `announce` tells the other ranks, 0 that it is over."""
    indices = itertools.count()

    def answer(question: dict[str, Any]) -> float:
        announce(question["steps"])
        began = time.perf_counter()
        for _ in range(question["steps"]):
            step(next(indices))
        announce(0)
        return time.perf_counter() - began

    serve({}, answer)


def main(role: str, config_file: str, data: str, device: str, port: str) -> None:
    config = load(config_file)
    torch.set_num_threads(config.numerics.threads)
    tokens = open_token_folder(Path(data), model_vocab_size=config.model.vocab_size, verify=False).train
    if role == "plain":
        run_rank0(plain(config, tokens, torch.device(device)), lambda steps: None)
        return
    rank = int(role.removeprefix("stage"))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_STAGES)
    step = pipelined(config, tokens, rank)

    def announce(steps: int) -> None:
        dist.broadcast(torch.tensor([steps]), 0)

    if rank == 0:
        run_rank0(step, announce)
        announce(-1)
    else:
        follow(step)
    dist.destroy_process_group()


def follow(step: Callable[[int], None]) -> None:
    """Does what rank 0 announces; 0 closes a measurement, so that both ranks have ended their last step."""
    indices = itertools.count()
    while True:
        asked = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(asked, 0)
        if asked.item() < 0:
            return
        for _ in range(int(asked.item())):
            step(next(indices))


if __name__ == "__main__":
    main(*sys.argv[1:])
