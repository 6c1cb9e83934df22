"""The rows of the numerics contract (DESIGN.md, section 8) about forward and backward passes, each bit for bit.

Where another order of additions must give other bits, that is asserted too: a test whose numbers could not differ proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.lane_compute import (
    count_targets,
    held_out_windows,
    inputs_of,
    micro_batches_of,
    run_stage,
    take_gradient,
    targets_of,
    training_windows,
)
from shardlane.model import Stage, token_loss_sum, whole_model
from shardlane.numerics import configure_torch
from shardlane.partition import EMBEDDING, HEAD, StageLayers, layer_costs, split_layers
from shardlane.process import process_environment
from shardlane.reference import Reference
from tests.numerics.toy import filled_stage, toy_config, toy_tokens

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    configure_torch(toy_config().numerics)
    return toy_tokens(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def cuda(tokens: TokenFolder, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in process_environment(1).items():
        monkeypatch.setenv(name, value)
    return "cuda"


def stages_of(config: Config, cuts: Sequence[int], device: str = "cpu") -> list[Stage]:
    layers = config.model.num_hidden_layers
    borders = [0, *cuts, layers]
    return [filled_stage(config, StageLayers(first, end, layers), device) for first, end in pairwise(borders)]


def over_the_wire(values: Tensor) -> Tensor:
    """In the native dtype, as bytes, into memory of its own."""
    sent = bytearray(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(sent, dtype=values.dtype).view(values.shape).clone().to(values.device)


def run_micro_batch(stages: Sequence[Stage], config: Config, windows: Tensor) -> float:
    """Forward and backward through a pipeline; gradients stay in the leaves. Those of weights come last, as in a worker."""
    device = next(stages[0].parameters()).device
    precision = config.numerics.precision
    weight_gradients = [stage.put_off_weight_gradients() for stage in stages]
    inputs, outputs = [inputs_of(windows, device)], []
    for stage in stages[:-1]:
        outputs.append(run_stage(stage, inputs[-1], precision))
        inputs.append(over_the_wire(outputs[-1]).requires_grad_())
    loss = run_stage(stages[-1], inputs[-1], precision, targets_of(windows, device))
    loss.backward()
    for x, out in zip(reversed(inputs[1:]), reversed(outputs), strict=True):
        assert x.grad is not None
        out.backward(over_the_wire(x.grad))
    for each in weight_gradients:
        each.add_all()
    return loss.item()


def run_lane(
    stages: Sequence[Stage], config: Config, tokens: TokenFolder, micro_batches: Sequence[int]
) -> tuple[float, Gradients]:
    loss = 0.0
    for m in micro_batches:
        loss += run_micro_batch(stages, config, training_windows(tokens.train, config, step=0, micro_batch=m))
    leaves = [item for stage in stages for item in stage.named_parameters()]
    return loss, {name: take_gradient(leaf) for name, leaf in leaves}


def same_bits(a: Gradients, b: Gradients) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_stage_cuts_change_no_bit(tokens: TokenFolder, precision: str, tied: bool) -> None:
    config = toy_config(**{"numerics.precision": precision, "model.tie_word_embeddings": tied})
    loss, whole = run_lane(stages_of(config, []), config, tokens, range(4))
    for cuts in ([2], [1, 3], [1, 2, 3]):
        cut_loss, cut = run_lane(stages_of(config, cuts), config, tokens, range(4))
        assert cut_loss == loss and same_bits(whole, cut)


@pytest.mark.parametrize("preset", ["tiny", "demo", "20m"])
def test_stages_are_cut_between_blocks(preset: str) -> None:
    model = toy_config(model={"preset": preset}).model
    stages = split_layers(layer_costs(model, 128), 3)
    assert [layer for stage in stages for layer in range(stage.first, stage.end)] == list(range(model.num_hidden_layers))


def test_tied_sites_are_leaves_of_their_own(tokens: TokenFolder) -> None:
    """Site sums are (a + b) + (c + d); one shared leaf would add ((a + c) + b) + d, and another one in two stages."""
    config = toy_config(**{"model.tie_word_embeddings": True})
    _, sites = run_lane(stages_of(config, []), config, tokens, range(2))
    canonical = sites[EMBEDDING] + sites[HEAD]

    shared = stages_of(config, [])
    embedding, head = shared[0].model.embed_tokens, shared[0].lm_head
    assert embedding is not None and head is not None and embedding.weight is not head.weight
    head.weight = embedding.weight
    _, gradients = run_lane(shared, config, tokens, range(2))
    assert HEAD not in gradients
    torch.testing.assert_close(gradients[EMBEDDING], canonical, rtol=1e-4, atol=1e-5)
    assert not torch.equal(gradients[EMBEDDING], canonical)

    reference = Reference(config, tokens)
    _, _, found = reference._run_lane(0, 0)
    flat = torch.cat(
        [total for total, chunk in zip(reference._chunk_sums(found), reference.layout.chunks, strict=True) if not chunk.tensor]
    )
    assert torch.equal(flat, canonical.flatten())


def test_micro_batches_add_up_in_index_order(tokens: TokenFolder) -> None:
    config = toy_config()
    stages = stages_of(config, [])
    _, in_order = run_lane(stages, config, tokens, range(4))
    _, again = run_lane(stages, config, tokens, range(4))
    _, reversed_order = run_lane(stages, config, tokens, [3, 2, 1, 0])
    assert same_bits(in_order, again)
    assert not same_bits(in_order, reversed_order), "the order would not matter, and nothing would be tested"
    assert micro_batches_of(3, config.train) == range(6, 8)


def test_a_micro_batch_is_one_call_of_one_shape(tokens: TokenFolder) -> None:
    config = toy_config(**{"train.max_steps": 2})
    shapes = []
    reference = Reference(config, tokens)
    reference._stage.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    list(reference.run())
    train = config.train
    assert len(shapes) == 2 * train.num_micro_batches + config.validation.num_micro_batches
    assert set(shapes) == {(train.micro_batch_size, train.seq_len)}


def test_inputs_are_aligned_memory_of_their_own(tokens: TokenFolder) -> None:
    windows = training_windows(tokens.train, toy_config(), step=0, micro_batch=0)
    for values in (inputs_of(windows, "cpu"), targets_of(windows, "cpu")):
        assert values.is_contiguous() and values.data_ptr() % 64 == 0
        assert values.untyped_storage().data_ptr() != windows.untyped_storage().data_ptr()


def test_autocast_casts_the_same_with_and_without_gradients_and_after_a_pull(tokens: TokenFolder) -> None:
    config = toy_config(**{"numerics.precision": "bf16"})
    windows = held_out_windows(tokens.held_out, config, index=0)
    inputs, targets = inputs_of(windows, "cpu"), targets_of(windows, "cpu")
    stage = filled_stage(config, whole_model(config.model))
    first = run_stage(stage, inputs, "bf16", targets)
    with torch.no_grad():
        assert torch.equal(first, run_stage(stage, inputs, "bf16", targets))
        for leaf in stage.parameters():
            leaf.mul_(1.25)
        pulled = run_stage(stage, inputs, "bf16", targets)
    assert not torch.equal(first, pulled)
    fresh = filled_stage(config, whole_model(config.model))
    with torch.no_grad():
        for leaf in fresh.parameters():
            leaf.mul_(1.25)
    again = run_stage(fresh, inputs, "bf16", targets)
    assert torch.equal(pulled, again) and again.dtype == torch.float32
    assert not torch.equal(again, run_stage(fresh, inputs, "fp32", targets)), "bf16 is not in use"


def test_the_loss_is_a_sum_over_the_targets_that_count() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, 5, 6, 7]])
    picked = logits.log_softmax(-1)[targets >= 0].gather(-1, targets[targets >= 0][:, None])
    assert token_loss_sum(logits, targets).item() == pytest.approx(-picked.sum().item(), rel=1e-6)
    assert count_targets(targets) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_repeats_its_bits_whole_or_cut(tokens: TokenFolder, cuda: str, precision: str) -> None:
    config = toy_config(**{"numerics.precision": precision, "train.seq_len": 128, "model.hidden_size": 128})
    loss, whole = run_lane(stages_of(config, [], cuda), config, tokens, range(4))
    for cuts in ([], [2], [1, 3]):
        again_loss, again = run_lane(stages_of(config, cuts, cuda), config, tokens, range(4))
        assert again_loss == loss and same_bits(whole, again)


@pytest.mark.gpu
def test_cuda_runs_end_with_one_digest(tokens: TokenFolder, cuda: str) -> None:
    runs = [Reference(toy_config(), tokens, device=cuda) for _ in range(2)]
    assert [row["loss"] for row in runs[0].run() if "loss" in row] == [row["loss"] for row in runs[1].run() if "loss" in row]
    assert runs[0].digest() == runs[1].digest()
