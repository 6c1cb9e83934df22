"""The half of a backward pass that only the weights need, put off until the stage before has the half that it waits for.

Zero-bubble pipeline parallelism splits the two (Qi et al. 2023, arXiv:2401.10241). Put off, a gradient can also be added to
what is there by the matrix product itself, and an embedding's touches only the rows of its tokens. Reference and workers
call `add` on the same tensors in the same order, so the bits are the same whenever they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """weight.grad += gradientᵀ · x. x: [rows, in]; gradient: [rows, out]; weight: [out, in]."""

    weight: Tensor
    x: Tensor
    gradient: Tensor

    def add(self) -> None:
        weight, transposed = self.weight, self.gradient.t()
        if weight.grad is None:
            weight.grad = (transposed @ self.x).to(weight.dtype)
        elif self.x.dtype == weight.dtype:
            weight.grad.addmm_(transposed, self.x)
        else:
            weight.grad.add_(transposed @ self.x)


@dataclass(frozen=True, slots=True)
class Rows:
    """weight.grad[ids] += gradient. ids: int64 [rows]; gradient: [rows, H]; weight: [V, H]."""

    weight: Tensor
    ids: Tensor
    gradient: Tensor

    def add(self) -> None:
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad.index_add_(0, self.ids, self.gradient)


Pending = Product | Rows


class WeightGradients:
    """Collects what the backward passes of a stage's products and embedding leave undone."""

    def __init__(self) -> None:
        self._pending: list[Pending] = []
        self.weights: list[Tensor] = []  # the leaves whose gradients come from here

    def take(self) -> list[Pending]:
        """What is pending, in the order of the backward pass; the caller's from then on."""
        taken, self._pending = self._pending, []
        return taken

    def add_all(self) -> None:
        for pending in self.take():
            pending.add()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x · weightᵀ, in the precision of autocast. x: [..., in]; weight: [out, in]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _Linear.apply(x, weight, dtype, self._keep)  # type: ignore[no-untyped-call]
        return out

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """weight[ids]. ids: int64 [...]; weight: [V, H]."""
        out: Tensor = _Embedding.apply(ids, weight, self._keep)  # type: ignore[no-untyped-call]
        return out

    def _keep(self, pending: Pending) -> None:
        self._pending.append(pending)


Keep = Callable[[Pending], None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, keep: Keep) -> Tensor:
        low, low_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(low, low_weight, weight)
        ctx.keep, ctx.dtype = keep, x.dtype
        return F.linear(low, low_weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, low_weight, weight = ctx.saved_tensors
        ctx.keep(Product(weight, x.detach().flatten(0, -2), gradient.flatten(0, -2)))
        return (gradient @ low_weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, keep: Keep) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.keep = keep
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        ids, weight = ctx.saved_tensors
        ctx.keep(Rows(weight, ids.flatten(), gradient.flatten(0, -2)))
        return None, None, None
