"""Host memory and the device: one and the same on a CPU, copies beside the computing on CUDA."""

from __future__ import annotations

import pytest
import torch

from shardlane.lane_compute import inputs_of, targets_of
from shardlane.lanes import lane
from shardlane.model import whole_model
from shardlane.numerics import configure_torch
from tests.numerics.toy import toy_config
from tests.worker_service.test_stage import windows
from worker_service.stage import StageCompute
from worker_service.staging import Staging


def test_a_cpu_copies_nothing() -> None:
    staging, tensor = Staging(torch.device("cpu")), torch.arange(6.0).view(2, 3)
    host = staging.to_host(tensor)
    assert host.values.data_ptr() == tensor.data_ptr()
    assert staging.to_device(host.values) is host.values
    staging.release(host)
    assert staging.pool.free_bytes == 0, "memory that autograd made is not ours to use again"


@pytest.mark.gpu
def test_cuda_there_and_back_in_pinned_memory() -> None:
    staging = Staging(torch.device("cuda", 0))
    tensor = torch.randn(1 << 20, device="cuda")
    expected = (tensor * 3).cpu()
    host = staging.to_host(tensor * 3)  # not computed yet when the copy is asked for
    assert host.wait is not None
    host.wait()
    assert host.values.is_pinned()
    assert torch.equal(host.values, expected)
    assert torch.equal(staging.to_device(host.values).cpu(), expected)
    staging.release(host)
    assert staging.pool.free_bytes == 4 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_on_cuda_repeats_its_bits(precision: str) -> None:
    config = toy_config(**{"numerics.precision": precision})
    configure_torch(config.numerics)
    device = torch.device("cuda", 0)
    staging, runs = Staging(device), []
    for _ in range(2):
        sums: dict[str, torch.Tensor] = {}

        def keep(name: str, block: object, total: torch.Tensor, sums: dict[str, torch.Tensor] = sums) -> None:
            host = staging.to_host(total)
            assert host.wait is not None
            host.wait()
            sums[name] = host.values.clone()

        stage = StageCompute(config, whole_model(config.model), device, keep)
        generator = torch.Generator(device).manual_seed(1)
        for each in stage.flat_parameters.values():
            each.normal_(std=0.1, generator=generator)
        for micro_batch in stage.begin((lane(0),)):
            both = windows(config, micro_batch)
            stage.forward(micro_batch, inputs_of(both, device), targets_of(both, device))
            stage.backward(micro_batch)
        runs.append((sums, stage.loss(lane(0))))
    (first, first_loss), (second, second_loss) = runs
    assert first_loss == second_loss
    assert all(torch.equal(first[name], second[name]) for name in first)
