"""The stage itself: forward and backward of one micro-batch at a time, and the sums of its gradients as they become complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shardlane.config import Config
from shardlane.ids import MicroBatch, Version
from shardlane.lane_compute import count_targets, micro_batches_of, run_stage, take_gradient
from shardlane.lane_sums import LaneSums
from shardlane.lanes import Block, lane
from shardlane.local_steps import LocalSteps
from shardlane.look_ahead import look_ahead
from shardlane.model import Stage
from shardlane.partition import Layout, StageLayers
from shardlane.rates import tree_sum
from shardlane.weight_gradients import Pending, Product

OnSum = Callable[[str, Block, Tensor], None]
"""(parameter's name, block, the block's gradient sum): called in the midst of a backward pass."""


@dataclass(slots=True)
class _Passed:
    """A micro-batch between its forward and its backward."""

    x: Tensor
    out: Tensor


class StageCompute:
    """A stage on `device`, built without weights: a pull fills `flat_parameters`. One thread computes with it."""

    def __init__(self, config: Config, layers: StageLayers, device: torch.device, on_sum: OnSum) -> None:
        self.layers = layers
        self._config = config
        self._device = device
        self.on_sum = on_sum
        self._per_lane = len(micro_batches_of(0, config.train))
        self._module = Stage.empty(config.model, layers, device)
        self._weight_gradients = self._module.put_off_weight_gradients()
        self._parameters = dict(self._module.named_parameters())
        self._names = {id(each): name for name, each in self._parameters.items()}
        self.flat_parameters = {name: each.detach().view(-1) for name, each in self._parameters.items()}
        self._sums = {name: LaneSums(config.train.lanes) for name in self._parameters}
        self._num_accumulated = dict.fromkeys(self._parameters, 0)
        self._lanes: list[tuple[int, Block]] = []  # in the order in which they run, each with its block
        self._passed: dict[MicroBatch, _Passed] = {}
        self._pending: dict[MicroBatch, list[Pending]] = {}
        self._losses: dict[int, list[Tensor]] = {}  # by lane, in index order
        self._local: LocalSteps | None = None
        self._num_lanes_done = 0  # with local steps
        self._before: dict[str, Tensor] = {}  # the version before the one in the parameters, to look ahead from
        self._restored: dict[str, Tensor] = {}  # what the parameters are again after a run that looked ahead
        if config.train.local_steps > 1:
            self._local = LocalSteps(config, self.flat_parameters, Layout.of(config).decays(layers))
        put_off = {id(each) for each in self._weight_gradients.weights}
        for name, parameter in self._parameters.items():
            if id(parameter) not in put_off:
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, name))

    def begin(self, blocks: Sequence[Block]) -> list[list[MicroBatch]]:
        """Forgets what was under way; the micro-batches of all lanes of `blocks`, in index order.

        Each list is one flush of the pipeline: `end_flush` comes after it. With local steps a lane has one for each.
        """
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._sums[name].clear()
            self._num_accumulated[name] = 0
        self._passed.clear()
        self._pending.clear()
        self._weight_gradients.take()
        self._losses.clear()
        self._num_lanes_done = 0
        self._lanes = [(each, block) for block in blocks for each in block.lanes]
        micro_batches = [MicroBatch(m) for each, _ in self._lanes for m in micro_batches_of(each, self._config.train)]
        size = max(1, len(micro_batches)) if self._local is None else self._per_lane // self._config.train.local_steps
        return [micro_batches[first : first + size] for first in range(0, len(micro_batches), size)]

    def end_flush(self, version: Version) -> None:
        """With local steps: makes one; after a lane's last one tells how far the lane has come."""
        if self._local is None:
            return
        config = self._config.train
        num_tokens = self._per_lane // config.local_steps * config.micro_batch_size * config.seq_len
        self._local.step(version, {name: take_gradient(each) for name, each in self._parameters.items()}, num_tokens)
        if self._local.is_lane_done:
            _, block = self._lanes[self._num_lanes_done]
            self._num_lanes_done += 1
            for name, values in self._local.take(num_tokens * config.local_steps).items():
                self.on_sum(name, block, values)

    def end(self) -> None:
        """The work is done or abandoned: the parameters are those of the version again."""
        if self._local is not None:
            self._local.restore()
        for name, values in self._restored.items():
            self.flat_parameters[name].copy_(values)
        self._restored.clear()

    def keep_before(self, *, is_of_the_version_before: bool) -> None:
        """Another version is about to come into the parameters: whether what they are is of the one before it."""
        self._before = {name: each.clone() for name, each in self.flat_parameters.items()} if is_of_the_version_before else {}

    def look_ahead(self, num_versions: int) -> None:
        """Until `end` the parameters are where they are headed in so many versions."""
        if not self._before:
            raise ValueError("the version before the one in the parameters is not known here")
        self._restored = {name: each.clone() for name, each in self.flat_parameters.items()}
        look_ahead(self.flat_parameters, {name: each.clone() for name, each in self._before.items()}, num_versions)

    def forward(self, micro_batch: MicroBatch, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x: int64 [B, T] in a first stage, else fp32 [B, T, H], which becomes a leaf. Hidden states [B, T, H], or the loss."""
        if not self.layers.is_first:
            x = x.detach().requires_grad_()
        out = run_stage(self._module, x, self._config.numerics.precision, targets)
        self._passed[micro_batch] = _Passed(x, out)
        if targets is not None:
            self._losses.setdefault(micro_batch // self._per_lane, []).append(out.detach())
        return out.detach()

    def backward(self, micro_batch: MicroBatch, gradient: Tensor | None = None) -> Tensor | None:
        """`gradient` of the hidden states that went out; None in a last stage. That of the ones that came in, if any.

        `add_weight_gradients` is the rest of it, for whose result no other stage waits.
        """
        passed = self._passed.pop(micro_batch)
        torch.autograd.backward(passed.out, gradient)
        # An embedding's first: cheap to add and large to push, it travels while the products are worked out.
        self._pending[micro_batch] = sorted(self._weight_gradients.take(), key=lambda each: isinstance(each, Product))
        return None if self.layers.is_first else passed.x.grad

    def add_weight_gradients(self, micro_batch: MicroBatch) -> None:
        """After `backward`, in the order of the micro-batches of a lane."""
        with torch.no_grad():
            for pending in self._pending.pop(micro_batch):
                pending.add()
                self._accumulated(self._names[id(pending.weight)], pending.weight)

    @torch.no_grad()
    def validate(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, int]:
        """Hidden states, or the loss; and the tokens that count in it."""
        out = run_stage(self._module, x, self._config.numerics.precision, targets)
        return out, 0 if targets is None else count_targets(targets)

    def loss(self, block: Block) -> float:
        """The block's sum of token losses: in index order within a lane, then along the tree. 0 in a stage without a head."""
        if not self.layers.is_last:
            return 0.0
        lanes = []
        for each in block.lanes:
            total = 0.0
            for loss in self._losses[each]:
                total += loss.item()
            lanes.append(total)
        return tree_sum(lanes)

    def _accumulated(self, name: str, parameter: Tensor) -> None:
        """One more micro-batch has been added to `parameter.grad`."""
        if self._local is not None:
            return
        self._num_accumulated[name] += 1
        finished, rest = divmod(self._num_accumulated[name], self._per_lane)
        if rest:
            return
        index, block = self._lanes[finished - 1]
        sums = self._sums[name]
        sums.add(lane(index), take_gradient(parameter))
        if index == block.lanes[-1]:
            self.on_sum(name, block, sums.take(block))
