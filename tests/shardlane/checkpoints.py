"""Small checkpoints for tests: state by arithmetic, dealt to as many parts as a test likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardlane.checkpoint import PartWriter
from shardlane.config import Config, build
from shardlane.ids import ChunkId, RunId, Version
from shardlane.manifest import Manifest, PartReport, build_manifest, checkpoint_folder, tensor_names, write_manifest
from shardlane.partition import Layout


def small_config(**changes: Any) -> Config:
    """35 k parameters in chunks of 5 KiB at most, so that tensors have several; `optimizer__name="sgd"` changes a key."""
    model = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    config = build({"model": {**model, "num_attention_heads": 2}, "numerics": {"chunk_bytes": 5 << 10}})
    return config.with_changes({key.replace("__", "."): value for key, value in changes.items()})


def state(config: Config, chunk: ChunkId) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(chunk)
    size = Layout.of(config).chunks[chunk].num_elements
    return {name: torch.randn(size, generator=generator) for name in tensor_names(config.optimizer.name)}


def write_part(folder: Path, owner: str, config: Config, chunks: Sequence[ChunkId]) -> PartReport:
    """Adds the chunks in the order given."""
    sizes = {chunk: Layout.of(config).chunks[chunk].num_elements for chunk in chunks}
    with PartWriter(folder, owner, sizes, tensor_names(config.optimizer.name)) as writer:
        for chunk in chunks:
            writer.add(chunk, state(config, chunk))
        return writer.finish()


def deal(config: Config, num_parts: int) -> list[list[ChunkId]]:
    """Every chunk once, dealt round."""
    chunks = [chunk.id for chunk in Layout.of(config).chunks]
    return [chunks[index::num_parts] for index in range(num_parts)]


def commit(folder: Path, config: Config, parts: Sequence[PartReport], **facts: Any) -> Manifest:
    defaults: Mapping[str, Any] = {"version": Version(100), "optimizer_step": 98, "run_id": RunId("r1"), "timeline": 3}
    hashes = {"numerics_class": "test cpu", "data_hash": "d" * 8, "tokenizer_hash": "t" * 8}
    manifest = build_manifest(config, parts, **{**defaults, **hashes, **facts})
    write_manifest(folder, manifest)
    return manifest


def write_checkpoint(root: Path, config: Config, *, version: int = 100, num_parts: int = 2, **facts: Any) -> Path:
    folder = checkpoint_folder(root, Version(version))
    parts = [write_part(folder, f"shard-{index}", config, chunks) for index, chunks in enumerate(deal(config, num_parts))]
    commit(folder, config, parts, version=Version(version), **{"optimizer_step": version, **facts})
    return folder


def flip(file: Path, position: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)
