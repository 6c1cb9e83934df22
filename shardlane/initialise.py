"""Version 0 of the weights, chunk by chunk: drawn from a counter-based generator, or read from a safetensors file.

A value depends on (seed, tensor name, position in the tensor) alone, so neither chunk borders nor who computes it can change
it: values are drawn in fixed blocks, each a Philox stream (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
with a key of its own. Raw bits of numpy's bit generators are guaranteed for ever (NEP 19), its distributions are not, hence our
own Box-Muller. Its log and cos are numpy's, whose last bit may differ between ISAs: bit for bit within a numerics class.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardlane.config import Config, ModelConfig
from shardlane.errors import CheckpointError
from shardlane.partition import Chunk, Layout, TensorSpec

BLOCK_ELEMENTS = 1 << 16
READABLE_DTYPES = ("F32", "BF16", "F16")
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")  # what writes into the residual stream


def initial_chunk(config: Config, layout: Layout, chunk: Chunk) -> Tensor:
    """A chunk's values at version 0: fp32 [chunk.num_elements], in memory of its own. Raises `CheckpointError`."""
    if config.checkpoint.init_from:
        return InitialWeights(Path(config.checkpoint.init_from)).read(layout.tensors[chunk.tensor], chunk)
    return initial_values(config, layout, chunk)


def initial_values(config: Config, layout: Layout, chunk: Chunk) -> Tensor:
    """A chunk's values by the generator: fp32 [chunk.num_elements]. Norms are ones, matrices normal(0, `deviation`)."""
    tensor = layout.tensors[chunk.tensor]
    values = np.ones(chunk.num_elements, dtype=np.float32)
    if len(tensor.shape) == 1:
        return torch.from_numpy(values)
    scale, end = deviation(config.model, tensor), chunk.offset + chunk.num_elements
    for block in range(chunk.offset // BLOCK_ELEMENTS, -(-end // BLOCK_ELEMENTS)):
        start = block * BLOCK_ELEMENTS
        low, high = max(chunk.offset, start), min(end, start + BLOCK_ELEMENTS)
        drawn = _normal_block(config.train.seed, tensor.name, block)[low - start : high - start]
        np.multiply(drawn, scale, out=values[low - chunk.offset : high - chunk.offset], casting="same_kind")
    return torch.from_numpy(values)


def deviation(model: ModelConfig, tensor: TensorSpec) -> float:
    """The standard deviation of a matrix: `initializer_range`, and GPT-2's 1/sqrt(2 · layers) of it into the residual stream.

    Radford et al. 2019, section 2.3: with 2 · layers addends, the stream's variance does not grow with depth.
    """
    if tensor.name.endswith(RESIDUAL_PROJECTIONS):
        return model.initializer_range / math.sqrt(2 * model.num_hidden_layers)
    return model.initializer_range


@lru_cache(maxsize=8)  # chunks smaller than a block ask for the same one in turn; 8 are 4 MiB
def _normal_block(seed: int, name: str, block: int) -> npt.NDArray[np.float64]:
    """Standard normals [BLOCK_ELEMENTS] of one block, always whole: a shorter call could take another SIMD path to a value."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=np.frombuffer(key, dtype="<u8"), counter=[0, block, 0, 0])  # word 0 counts within the block
    uniform = (philox.random_raw(BLOCK_ELEMENTS) >> np.uint64(11)) * 2.0**-53  # [0, 1), 53 bits
    radius = np.sqrt(-2.0 * np.log1p(-uniform[: BLOCK_ELEMENTS // 2]))  # of 1 - u, in (0, 1]
    angle = 2.0 * np.pi * uniform[BLOCK_ELEMENTS // 2 :]
    normals: npt.NDArray[np.float64] = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    normals.setflags(write=False)  # it is shared by all who ask
    return normals


class InitialWeights:
    """A safetensors file with Hugging Face names, or the `.index.json` of a sharded one; reads no more than a chunk's rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, tensor: TensorSpec, chunk: Chunk) -> Tensor:
        """A chunk of `tensor`: fp32 [chunk.num_elements], in memory of its own. Raises `CheckpointError`."""
        file = self._file_of(tensor.name)
        try:
            with safe_open(file, framework="pt") as opened:
                if tensor.name not in opened.keys():  # noqa: SIM118  (a safe_open is no mapping)
                    raise CheckpointError(f"{file} has no tensor {tensor.name!r}, which checkpoint.init_from must give")
                return self._read_rows(opened.get_slice(tensor.name), tensor, chunk)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}, named by checkpoint.init_from: {error}") from error

    def _read_rows(self, stored: Any, tensor: TensorSpec, chunk: Chunk) -> Tensor:
        """The chunk's values out of the whole rows that hold them: a slice can only be cut along rows."""
        if (shape := tuple(stored.get_shape())) != tensor.shape:
            raise CheckpointError(f"{self.path}: {tensor.name} has shape {list(shape)}, the config wants {list(tensor.shape)}")
        if (dtype := stored.get_dtype()) not in READABLE_DTYPES:
            raise CheckpointError(f"{self.path}: {tensor.name} is {dtype}, expected one of {', '.join(READABLE_DTYPES)}")
        row = math.prod(tensor.shape[1:])
        first, end = chunk.offset // row, -(-(chunk.offset + chunk.num_elements) // row)
        rows: Tensor = stored[first:end].flatten()
        start = chunk.offset - first * row
        return torch.empty(chunk.num_elements).copy_(rows[start : start + chunk.num_elements])

    def _file_of(self, name: str) -> Path:
        if self.path.suffix != ".json":
            return self.path
        try:
            files = json.loads(self.path.read_text(encoding="utf-8"))["weight_map"]
            return self.path.parent / str(files[name])
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}, named by checkpoint.init_from: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is no index of safetensors files with the tensor {name!r}") from error
