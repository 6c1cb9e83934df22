"""The digest of a version, and its tensors whole (DESIGN.md, section 8).

SHA-256 over tensors sorted by name, whole, fp32 little-endian: the parameters, then each optimizer state in order of its
name, then the optimizer's step as a little-endian int64. Where a chunk lies, and which shard wrote it, leaves no trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shardlane.checkpoint import CheckpointReader, raw_bytes
from shardlane.ids import ChunkId
from shardlane.manifest import PARAMETER
from shardlane.partition import Chunk, Layout
from shardlane.storage import Location


def checkpoint_digest(folder: Location) -> str:
    """The digest of a checkpoint, every byte verified on the way, one chunk at a time. Raises `CheckpointError`."""
    with CheckpointReader(folder) as reader:
        return state_digest(reader.layout, reader.manifest.tensor_names, reader.read_tensor, reader.manifest.optimizer_step)


def state_digest(layout: Layout, names: tuple[str, ...], read: Callable[[ChunkId, str], Tensor], optimizer_step: int) -> str:
    """The digest of any state. `names`: `parameter` and the optimizer's states; `read` gives one of them of a chunk, fp32."""
    total = hashlib.sha256()
    for name in (PARAMETER, *sorted(set(names) - {PARAMETER})):
        for _, chunks in sorted(_chunks_by_tensor(layout).items()):
            for chunk in chunks:
                total.update(raw_bytes(read(chunk.id, name)))
    total.update(optimizer_step.to_bytes(8, "little", signed=True))
    return total.hexdigest()


def read_tensors(folder: Location) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its Hugging Face name, whole and in its shape, fp32, one at a time; a tied one once."""
    with CheckpointReader(folder) as reader:
        shapes = {tensor.name: tensor.shape for tensor in reader.layout.tensors}
        for name, chunks in _chunks_by_tensor(reader.layout).items():
            whole = torch.empty(shapes[name], dtype=torch.float32)
            for chunk in chunks:
                whole.view(-1)[chunk.offset : chunk.offset + chunk.num_elements] = reader.read_tensor(chunk.id, PARAMETER)
            yield name, whole


def _chunks_by_tensor(layout: Layout) -> dict[str, list[Chunk]]:
    """Chunks of each tensor by offset, tensors in the model's order."""
    found: dict[str, list[Chunk]] = {tensor.name: [] for tensor in layout.tensors}
    for chunk in layout.chunks:
        found[layout.tensors[chunk.tensor].name].append(chunk)
    return found
