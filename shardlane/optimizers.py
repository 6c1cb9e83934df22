"""The optimizer of one chunk: `torch.optim`'s own fused step over one flat tensor (DESIGN.md, section 8). Under SSP it keeps the
versions before the present one, from which steps are still to be computed.

One tensor a chunk, never chunks joined: a fused kernel handles the tail of a tensor, shorter than its vectors, with other
instructions, so values would depend on what they were joined with. `parameter` is 1-D fp32 and has memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardlane.config import OptimizerConfig
from shardlane.partition import OPTIMIZER_STATES, past_names


class ChunkOptimizer:
    """Steps one chunk, on CPU or CUDA.

    `adamw` decouples weight decay (Loshchilov & Hutter 2019); the others add `weight_decay · parameter` to
    the gradient, as torch does (L2). Either happens only where `decay` is True: not for norms. Momentum is torch's, with
    Nesterov's look ahead or without: no dampening, and the first step's buffer is the gradient itself.
    """

    def __init__(self, config: OptimizerConfig, parameter: Tensor, *, decay: bool, num_past: int = 0) -> None:
        if parameter.dim() != 1 or parameter.dtype != torch.float32 or not parameter.is_contiguous():
            raise ValueError(f"a chunk is flat fp32, found {parameter.dtype} of shape {tuple(parameter.shape)}")
        self.parameter = parameter
        self.num_steps = 0  # updates applied; a skipped step is none
        self.past: list[Tensor] = [parameter.detach().clone()] * num_past  # the newest first; none is ever written again
        self._names: tuple[str, ...] = OPTIMIZER_STATES[config.name]
        self._past_names = past_names(num_past)
        self._optimizer = _fused(config, parameter, config.weight_decay if decay else 0.0)

    def begin_version(self) -> None:
        """What the parameters are now is the past. Once a step, whether it is applied or skipped."""
        if self.past:
            self.past = [self.parameter.detach().clone(), *self.past[:-1]]

    def version_ago(self, back: int) -> Tensor:
        """The parameters `back` versions ago, at most `num_past`; before version 0 they were what they were then."""
        return self.past[back - 1] if back else self.parameter.detach()

    def apply(self, gradient_sum: Tensor, *, scale: float, learning_rate: float) -> None:
        """One step with `gradient_sum * scale`; the multiplication happens in place, in fp32."""
        self.parameter.grad = gradient_sum.mul_(scale)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self.parameter.grad = None
        self.num_steps += 1

    def states(self) -> dict[str, Tensor]:
        """The live state tensors by `partition.state_names`; zeros before the first step, but for the past."""
        held = self._optimizer.state[self.parameter]
        states = {name: held[name] if name in held else torch.zeros_like(self.parameter) for name in self._names}
        return {**states, **dict(zip(self._past_names, self.past, strict=True))}

    def load(self, states: Mapping[str, Tensor], num_steps: int) -> None:
        """Takes up `states` (copied, but for the past) as they were after `num_steps` updates. A past that is not there, as in a
        checkpoint of another run, was like the present. Raises `ValueError` on a wrong name or shape.
        """
        names = (*self._names, *self._past_names)
        shapes = {name: tuple(states[name].shape) for name in names if name in states}
        if not set(self._names) <= states.keys() <= set(names) or any(
            each != tuple(self.parameter.shape) for each in shapes.values()
        ):
            raise ValueError(f"optimizer states {sorted(states)} do not fit {names} of shape {tuple(self.parameter.shape)}")
        self.past = [states[name] if name in states else self.parameter.detach().clone() for name in self._past_names]
        self.num_steps = num_steps
        self._optimizer.state.clear()
        if not num_steps or not self._names:
            return  # torch makes its states at the first step, which for momentum is unlike the others
        state = {name: torch.empty_like(self.parameter).copy_(states[name]) for name in self._names}
        if "exp_avg" in state:  # torch counts in fp32: exact up to 2^24 steps, where bias correction is long over
            state["step"] = torch.tensor(float(num_steps), dtype=torch.float32, device=self.parameter.device)
        self._optimizer.state[self.parameter] = state


def _fused(config: OptimizerConfig, parameter: Tensor, weight_decay: float) -> torch.optim.Optimizer:
    match config.name:
        case "sgd":
            return torch.optim.SGD([parameter], weight_decay=weight_decay, fused=True)
        case "momentum" | "nesterov":
            nesterov = config.name == "nesterov"
            return torch.optim.SGD(
                [parameter], momentum=config.momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
            )
        case "adam" | "adamw":
            kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
            betas = (config.beta1, config.beta2)
            return kind([parameter], betas=betas, eps=config.eps, weight_decay=weight_decay, fused=True)
