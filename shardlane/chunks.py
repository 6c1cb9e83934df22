"""Tensor ↔ bytes: views without a copy, and pieces that arrive put together in aligned memory that is used again.

A first touch of memory costs eight times a second one (DESIGN.md, section 9), so received values land in buffers of a pool, or
in the tensor that they are for. Nobody computes on a view of a message: it need not be aligned.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shardlane.errors import MalformedError

# Numbers of `shardlane.tensor.v1.DType`; written out because this floor lies below the generated code. A test compares them.
_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.int32, 5: torch.int64, 6: torch.uint8}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


class Piece(Protocol):
    """What is read of a `shardlane.tensor.v1.Slice`."""

    @property
    def dtype(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def total(self) -> int: ...


def dtype_to_wire(dtype: torch.dtype) -> int:
    """The number of `shardlane.tensor.v1.DType`. Raises `ValueError` for a dtype that has none."""
    try:
        return _NUMBERS[dtype]
    except KeyError:
        raise ValueError(f"{dtype} does not travel; expected one of {', '.join(map(str, _NUMBERS))}") from None


def dtype_from_wire(number: int) -> torch.dtype:
    """Raises `MalformedError` for a number that is none of ours."""
    try:
        return _DTYPES[number]
    except KeyError:
        raise MalformedError(f"dtype {number} is unknown; expected one of fp32, bf16, fp16, int32, int64, uint8") from None


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, little-endian, row-major: no copy, writable, alive as long as the view is.

    Raises `ValueError` for a tensor on a device or with gaps, and for a dtype that does not travel.
    """
    dtype_to_wire(tensor.dtype)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor, found strides {tensor.stride()} on {tensor.device}")
    return _bytes_of(tensor).data


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class Assembly:
    """One tensor that arrives in order, piece by piece, into `into`: a contiguous CPU tensor of its dtype and size.

    Each piece was through `wire.check_slice` before. `what` names the tensor in errors.
    """

    def __init__(self, into: Tensor, what: str) -> None:
        self.tensor = into
        self._what = what
        self._dtype = dtype_to_wire(into.dtype)
        byte_view(into)  # refuses what has no bytes to write to
        self._bytes = _bytes_of(into)
        self._filled = 0

    @property
    def num_bytes(self) -> int:
        return len(self._bytes)

    @property
    def complete(self) -> bool:
        return self._filled == len(self._bytes)

    def add(self, piece: Piece, payload: bytes | bytearray | memoryview) -> bool:
        """Takes the next piece; whether it was the last one.

        Raises `MalformedError`, and takes nothing, for a gap, an overlap, or another dtype or total than the tensor's.
        """
        if piece.dtype != self._dtype or piece.total != len(self._bytes):
            raise MalformedError(
                f"{self._what}: a piece of {piece.total} bytes of dtype {piece.dtype};"
                f" expected {len(self._bytes)} of {self._dtype} ({self.tensor.dtype})"
            )
        end = piece.offset + len(payload)
        if piece.offset != self._filled or end > len(self._bytes):
            raise MalformedError(
                f"{self._what}: bytes {piece.offset}..{end} of {len(self._bytes)}; the next piece must begin at {self._filled}"
            )
        self._bytes[piece.offset : end] = np.frombuffer(payload, np.uint8)  # numpy's copy lets other threads run
        self._filled = end
        return self.complete

    def restart(self) -> None:
        """Forgets the pieces so far; the next one begins at 0."""
        self._filled = 0


class BufferPool:
    """Flat CPU tensors, aligned to 64 bytes, that are used again. Safe to share between threads.

    At most `keep_bytes_max` of unused memory is kept. `pinned`: page-locked, for copies to and from a CUDA device.
    """

    def __init__(self, keep_bytes_max: int, *, pinned: bool = False) -> None:
        self._keep_bytes_max = keep_bytes_max
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._free_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self._free_bytes

    def take(self, num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor [num_elements], the caller's until `give`; one never given back is just freed."""
        num_bytes = num_elements * dtype.itemsize
        with self._lock:
            free = self._free[num_bytes]
            if free:
                self._free_bytes -= num_bytes
                return free.pop().view(dtype)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned).view(dtype)

    def give(self, tensor: Tensor) -> None:
        """Takes back a tensor of `take`, in any shape. Nobody may use it, or a view of it, from then on."""
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        with self._lock:
            if self._free_bytes + raw.numel() <= self._keep_bytes_max:
                self._free[raw.numel()].append(raw)
                self._free_bytes += raw.numel()
