"""Steps that a lane makes by itself between two pushes: DiLoCo (Douillard et al. 2023), with pipelines inside a replica.

A lane's micro-batches of one step are shared among `train.local_steps` local steps of an optimizer of its own, `[inner]`. What it
pushes is no gradient but how far it has come: parameters before less parameters after, times its tokens, which the shards add up
and divide by all tokens, as they do with gradients. Their optimizer, with Nesterov's momentum as a rule, takes the mean for one.

Every lane begins a step with a fresh inner optimizer. So what it pushes is a function of the version and the lane's data, as
everything is that lanes push, and a death costs the lane's local steps of this one step, and no bit.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from shardlane.config import Config
from shardlane.optimizers import ChunkOptimizer
from shardlane.rates import learning_rate


class LocalSteps:
    """Works in place on `parameters`: flat fp32, by name. One thread at a time."""

    def __init__(self, config: Config, parameters: Mapping[str, Tensor], decays: Mapping[str, bool]) -> None:
        self._config, self._parameters, self._decays = config, parameters, decays
        self._before: dict[str, Tensor] = {}  # the lane's first; empty between lanes
        self._optimizers: dict[str, ChunkOptimizer] = {}
        self._num_done = 0

    def step(self, version: int, gradients: Mapping[str, Tensor], num_tokens: int) -> None:
        """One local step of a lane, with the gradients of the sum of `num_tokens` token losses, which it consumes."""
        if not self._before:
            self._before = {name: each.clone() for name, each in self._parameters.items()}
            for name, each in self._parameters.items():
                self._optimizers[name] = ChunkOptimizer(self._config.inner, each, decay=self._decays[name])
        train = self._config.train
        rate = learning_rate(
            version * train.local_steps + self._num_done,
            optimizer=self._config.inner,
            schedule=self._config.schedule,
            max_steps=train.max_steps * train.local_steps,
        )
        for name, gradient in gradients.items():
            self._optimizers[name].apply(gradient.view(-1), scale=1.0 / num_tokens, learning_rate=rate)
        self._num_done += 1

    @property
    def is_lane_done(self) -> bool:
        return self._num_done == self._config.train.local_steps

    def take(self, num_tokens: int) -> dict[str, Tensor]:
        """How far the lane has come, times its tokens, flat; the parameters are again what they were before it."""
        found = {name: (before - self._parameters[name]).mul_(num_tokens) for name, before in self._before.items()}
        self.restore()
        return found

    def restore(self) -> None:
        """Whatever a lane has done that did not come to its end is undone."""
        for name, before in self._before.items():
            self._parameters[name].copy_(before)
        self._before.clear()
        self._optimizers.clear()
        self._num_done = 0
