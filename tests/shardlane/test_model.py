"""The decoder itself, and the row of DESIGN.md section 8 that says: stage cuts change no bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from shardlane.config import Config, ModelConfig
from shardlane.initialise import initial_chunk
from shardlane.model import IGNORED_TARGET, Stage, autocast, token_loss_sum, whole_model
from shardlane.partition import EMBEDDING, HEAD, Layout, StageLayers

Precision = Literal["fp32", "bf16"]


def tiny(**changes: object) -> Config:
    return Config(model=ModelConfig.model_validate({"preset": "tiny", **changes}))


def cut(bounds: tuple[int, ...]) -> list[StageLayers]:
    """(1, 3) of four layers: 0, 1..2 and 3."""
    edges = (0, *bounds, 4)
    return [StageLayers(first, end, 4) for first, end in itertools.pairwise(edges)]


def filled(config: Config, layers: StageLayers) -> Stage:
    """A stage at version 0, filled as a worker fills it: chunk by chunk, each site its own."""
    layout, stage = Layout.of(config), Stage.empty(config.model, layers, "cpu")
    parameters = dict(stage.named_parameters())
    with torch.no_grad():
        for item in layout.stage_chunks(layers):
            values = parameters[item.parameter].view(-1)
            values[item.chunk.offset : item.chunk.offset + item.chunk.num_elements] = initial_chunk(config, layout, item.chunk)
    return stage


def batch(vocab_size: int = 512) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens, each int64 [3, 48]: no multiple of a tile, so that edges are covered too."""
    ids = torch.randint(vocab_size, (3, 49), generator=torch.Generator().manual_seed(7))
    return ids[:, :-1], ids[:, 1:]


def run_pipeline(stages: list[Stage], precision: Precision) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One micro-batch through detached stages, as on the wire: activations and loss, and the gradients by parameter."""
    ids, targets = batch()
    inputs, outputs = [ids], []
    for stage in stages:
        with autocast(precision, "cpu"):
            outputs.append(stage(inputs[-1]))
        inputs.append(outputs[-1].detach().clone().requires_grad_())
    loss = token_loss_sum(outputs[-1], targets)
    loss.backward()
    for output, received in zip(reversed(outputs[:-1]), reversed(inputs[1:-1]), strict=True):
        output.backward(received.grad)
    grads = {name: p.grad for stage in stages for name, p in stage.named_parameters() if p.grad is not None}
    return [*outputs, loss], grads


def bits(tensor: Tensor) -> Tensor:
    """Equality of these tells −0 from 0."""
    return tensor.detach().contiguous().view(torch.uint8 if tensor.dim() else torch.int32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bounds", [(1,), (2,), (3,), (1, 3), (2, 3), (1, 2, 3)])
def test_stage_cuts_change_no_bit(bounds: tuple[int, ...], precision: Precision, tied: bool) -> None:
    config = tiny(tie_word_embeddings=tied)
    whole = filled(config, whole_model(config.model))
    activations: dict[int, Tensor] = {}  # by the number of layers passed
    for number, layer in whole.model.layers.items():
        layer.register_forward_hook(lambda _module, _inputs, out, end=int(number) + 1: activations.update({end: out}))
    (logits, loss), grads = run_pipeline([whole], precision)
    outputs, cut_grads = run_pipeline([filled(config, layers) for layers in cut(bounds)], precision)
    *hidden, cut_logits, cut_loss = outputs
    for end, each in zip(bounds, hidden, strict=True):
        assert torch.equal(bits(each), bits(activations[end])), f"activations after layer {end - 1}"
    assert torch.equal(bits(cut_logits), bits(logits))
    assert torch.equal(bits(cut_loss), bits(loss))
    assert cut_grads.keys() == grads.keys() == {name for name, _ in whole.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    differing = [name for name in grads if not torch.equal(bits(grads[name]), bits(cut_grads[name]))]
    assert differing == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bounds", [(), (1,), (2, 3), (1, 2, 3)])
def test_a_stage_has_the_parameters_that_the_layout_gives_it(bounds: tuple[int, ...], tied: bool) -> None:
    config = tiny(tie_word_embeddings=tied)
    layout = Layout.of(config)
    for layers in cut(bounds):
        with torch.device("meta"):
            stage = Stage(config.model, layers)
        wanted = {item.parameter: layout.tensors[item.chunk.tensor].shape for item in layout.stage_chunks(layers)}
        assert {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()} == wanted
        assert stage.state_dict().keys() == wanted.keys()
        assert list(stage.buffers()) == [], "a buffer is garbage after to_empty"


def test_tied_sites_are_leaves_of_their_own_whose_gradients_differ() -> None:
    config = tiny(tie_word_embeddings=True)
    whole = filled(config, whole_model(config.model))
    parameters = dict(whole.named_parameters())
    assert torch.equal(parameters[EMBEDDING], parameters[HEAD])
    assert parameters[EMBEDDING].data_ptr() != parameters[HEAD].data_ptr()
    _, grads = run_pipeline([whole], "fp32")
    assert not torch.equal(grads[EMBEDDING], grads[HEAD])


def test_the_same_call_gives_the_same_bits_again() -> None:
    config = tiny()
    runs = [run_pipeline([filled(config, whole_model(config.model))], "fp32")[1] for _ in range(2)]
    assert all(torch.equal(bits(runs[0][name]), bits(runs[1][name])) for name in runs[0])


def test_a_later_token_changes_nothing_before_it() -> None:
    config = tiny()
    stage, (ids, _) = filled(config, whole_model(config.model)), batch()
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 512
    with torch.inference_mode():
        before, after = stage(ids), stage(changed)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30], after[:, 30])


def test_under_autocast_the_residual_stream_stays_fp32() -> None:
    config = tiny()
    (hidden, logits, loss), grads = run_pipeline([filled(config, layers) for layers in cut((2,))], "bf16")
    assert (hidden.dtype, logits.dtype, loss.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


def test_the_loss_is_a_sum_over_the_tokens_that_count() -> None:
    logits, targets = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1)), torch.arange(10).view(2, 5)
    each = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert token_loss_sum(logits, targets).shape == ()
    torch.testing.assert_close(token_loss_sum(logits, targets), each.sum())
    targets[1, 2:] = IGNORED_TARGET
    torch.testing.assert_close(token_loss_sum(logits, targets), each[0].sum() + each[1, :2].sum())
    assert token_loss_sum(logits, torch.full_like(targets, IGNORED_TARGET)) == 0


def test_a_stage_of_llama_3_8b_on_meta_takes_no_memory() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    with torch.device("meta"):
        stage = Stage(ModelConfig(preset="llama-3-8b"), StageLayers(0, 8, 32))
    assert sum(parameter.numel() for parameter in stage.parameters()) == 2_270_232_576
    assert all(parameter.is_meta for parameter in stage.parameters())
    assert resident_bytes() - before < 32 << 20
    assert stage(torch.zeros(1, 16, dtype=torch.int64, device="meta")).shape == (1, 16, 4096)
