"""Between the device that computes and the host memory that travels. On a CPU they are one, and nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlane.chunks import BufferPool

_KEEP_BYTES = 1 << 30  # of pinned or touched memory that waits to be used again


@dataclass(slots=True)
class HostTensor:
    """Values in host memory, flat; they are there once `wait` has returned."""

    values: Tensor
    wait: Callable[[], None] | None = None
    pooled: bool = False


class Staging:
    """Copies to and from `device` on a stream of their own, so that computing goes on meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = BufferPool(_KEEP_BYTES, pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_host(self, tensor: Tensor) -> HostTensor:
        """`tensor` belongs to the result from then on."""
        flat = tensor.detach().reshape(-1)
        if self._stream is None:
            return HostTensor(flat)
        host = self.pool.take(flat.numel(), flat.dtype)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
            done = self._stream.record_event()
        flat.record_stream(self._stream)
        return HostTensor(host, done.synchronize, pooled=True)

    def to_device(self, host: Tensor) -> Tensor:
        """On a CPU the very memory of `host`: it may be used again only when the result is not needed any more."""
        if self._stream is None:
            return host
        with torch.cuda.stream(self._stream):
            tensor = host.to(self.device, non_blocking=True)
            done = self._stream.record_event()
        done.wait(torch.cuda.current_stream(self.device))
        tensor.record_stream(torch.cuda.current_stream(self.device))
        done.synchronize()  # `host` may be used again at once; the copy does not wait for the computing stream
        return tensor

    def release(self, host: HostTensor) -> None:
        """Nobody needs the values any more."""
        if host.pooled:
            self.pool.give(host.values)
