"""A stage adds up exactly what plain autograd gives, and hands each sum on as soon as it is whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardlane.config import Config
from shardlane.initialise import initial_chunk
from shardlane.lane_compute import inputs_of, micro_batches_of, run_stage, targets_of
from shardlane.lanes import Block, lane
from shardlane.model import whole_model
from shardlane.partition import Layout, StageLayers, layer_costs, split_layers
from shardlane.rates import tree_sum
from tests.numerics.toy import VOCAB_SIZE, filled_stage, toy_config
from worker_service.core.schedule import Backward, Forward, ScheduleName, schedule
from worker_service.stage import StageCompute


def windows(config: Config, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(micro_batch)
    size = (config.train.micro_batch_size, config.train.seq_len + 1)
    return torch.randint(VOCAB_SIZE, size, generator=generator)


class Sums(dict[tuple[str, Block], Tensor]):
    def __call__(self, name: str, block: Block, total: Tensor) -> None:
        assert (name, block) not in self
        self[name, block] = total


def stage_of(config: Config, layers: StageLayers, sums: Sums) -> StageCompute:
    stage = StageCompute(config, layers, torch.device("cpu"), sums)
    layout = Layout.of(config)
    for item in layout.stage_chunks(layers):
        target = stage.flat_parameters[item.parameter].narrow(0, item.chunk.offset, item.chunk.num_elements)
        target.copy_(initial_chunk(config, layout, item.chunk))
    return stage


def lane_gradients(config: Config) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Plain backward passes of the whole model: each lane's gradients, and its loss."""
    module = filled_stage(config, whole_model(config.model))
    weight_gradients = module.put_off_weight_gradients()
    gradients, losses = [], []
    for index in range(config.train.lanes):
        loss_sum = 0.0
        for micro_batch in micro_batches_of(index, config.train):
            both = windows(config, micro_batch)
            loss = run_stage(module, inputs_of(both, "cpu"), config.numerics.precision, targets_of(both, "cpu"))
            loss.backward()
            weight_gradients.add_all()
            loss_sum += loss.item()
        gradients.append({name: each.grad for name, each in module.named_parameters() if each.grad is not None})
        losses.append(loss_sum)
        module.zero_grad(set_to_none=True)
    return gradients, losses


def run(config: Config, stages: list[StageCompute], blocks: tuple[Block, ...]) -> None:
    """All stages on one thread, each action as soon as what it needs is there."""
    (micro_batches,), *_ = [stage.begin(blocks) for stage in stages]
    waiting = [schedule(config.pipeline.schedule, p, len(stages), micro_batches) for p in range(len(stages))]
    sent: dict[tuple[type, int, int], Any] = {}  # (action, stage that sent, micro-batch)
    while any(waiting):
        for p, (stage, actions) in enumerate(zip(stages, waiting, strict=True)):
            for action in list(actions):
                m = action.micro_batch
                if isinstance(action, Forward):
                    if p and (Forward, p - 1, m) not in sent:
                        break
                    x = sent[Forward, p - 1, m] if p else inputs_of(windows(config, m), "cpu")
                    targets = targets_of(windows(config, m), "cpu") if stage.layers.is_last else None
                    sent[Forward, p, m] = stage.forward(m, x, targets)
                elif isinstance(action, Backward):
                    if not stage.layers.is_last and (Backward, p + 1, m) not in sent:
                        break
                    sent[Backward, p, m] = stage.backward(m, None if stage.layers.is_last else sent[Backward, p + 1, m])
                else:
                    stage.add_weight_gradients(m)
                actions.remove(action)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule_name", ["1f1b", "gpipe", "zero_bubble"])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_block_sums_are_those_of_plain_backward_passes(
    num_stages: int, schedule_name: ScheduleName, precision: str, tied: bool
) -> None:
    changes = {"pipeline.schedule": schedule_name, "numerics.precision": precision, "model.tie_word_embeddings": tied}
    config = toy_config(**changes)
    sums, blocks = Sums(), (Block(lane(0).first, 2), lane(3))
    cuts = split_layers(layer_costs(config.model, config.train.seq_len), num_stages)
    stages = [stage_of(config, layers, sums) for layers in cuts]
    run(config, stages, blocks)

    gradients, losses = lane_gradients(config)
    assert {name for name, _ in sums} == set(gradients[0])
    for name in gradients[0]:
        assert torch.equal(sums[name, blocks[0]], gradients[0][name] + gradients[1][name])
        assert torch.equal(sums[name, blocks[1]], gradients[3][name])
    assert [stages[-1].loss(each) for each in blocks] == [tree_sum(losses[:2]), losses[3]]
    if num_stages > 1:
        assert stages[0].loss(blocks[0]) == 0.0


def test_sums_come_while_weight_gradients_are_added() -> None:
    config = toy_config()
    order: list[str] = []
    stage = StageCompute(config, whole_model(config.model), torch.device("cpu"), lambda name, block, total: order.append(name))
    for each in stage.flat_parameters.values():
        each.fill_(0.01)
    ((first, second),) = stage.begin((lane(0),))
    for micro_batch in (first, second):
        both = windows(config, micro_batch)
        stage.forward(micro_batch, inputs_of(both, "cpu"), targets_of(both, "cpu"))
    stage.backward(first)
    stage.add_weight_gradients(first)
    assert order == [], "the lane's second micro-batch is missing"
    stage.backward(second)
    assert order and all("norm" in name for name in order), "only norms do not wait"
    num_norms = len(order)
    stage.add_weight_gradients(second)
    assert order[num_norms : num_norms + 2] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    config = toy_config()
    sums = Sums()
    stage = stage_of(config, whole_model(config.model), sums)
    run(config, [stage], (lane(1),))
    expected = dict(sums)
    sums.clear()
    (micro_batches,) = stage.begin((Block(lane(0).first, 2),))
    for micro_batch in micro_batches[:3]:  # stops in the midst of lane 1
        both = windows(config, micro_batch)
        stage.forward(micro_batch, inputs_of(both, "cpu"), targets_of(both, "cpu"))
        stage.backward(micro_batch)
        if micro_batch % 2:  # the other ones stay pending
            stage.add_weight_gradients(micro_batch)
    assert not {name for name, _ in sums if "norm" not in name}
    sums.clear()
    run(config, [stage], (lane(1),))
    assert {key: value.sum().item() for key, value in sums.items()} == {
        key: value.sum().item() for key, value in expected.items()
    }
    assert all(torch.equal(sums[key], expected[key]) for key in expected)


def test_what_the_hook_raises_comes_out_of_backward() -> None:
    """A full push queue is left by raising `Abandoned` through autograd."""
    config = toy_config()

    def refuse(name: str, block: Block, total: Tensor) -> None:
        raise InterruptedError(name)

    stage = StageCompute(config, whole_model(config.model), torch.device("cpu"), refuse)
    with pytest.raises(InterruptedError):
        run(config, [stage], (lane(0),))
