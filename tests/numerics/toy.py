"""The smallest run that has everything: 4 layers, 4 lanes of 2 micro-batches, tensors of several chunks, a ragged last chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardlane.config import Config, build
from shardlane.data import TokenFolder, open_token_folder, write_token_folder
from shardlane.initialise import initial_chunk
from shardlane.model import Stage
from shardlane.partition import Layout, StageLayers

VOCAB_SIZE = 101


def toy_config(**changes: Any) -> Config:
    """`toy_config(**{"train.max_steps": 8})`: dotted keys changed."""
    config = build(
        {
            "model": {
                "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
            },
            "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 16, "lanes": 4, "max_steps": 6},
            "optimizer": {"learning_rate": 1e-2},
            "validation": {"num_micro_batches": 2},
            "numerics": {"chunk_bytes": 2048},
        }
    )  # fmt: skip
    return config.with_changes(changes)


def toy_tokens(folder: Path, seed: int = 7) -> TokenFolder:
    """A few thousand tokens with something to learn: a noisy walk over the vocabulary."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)

    def documents(count: int) -> list[list[int]]:
        return [[*(np.cumsum(random.integers(0, 3, 200)) % (VOCAB_SIZE - 1) + 1).tolist(), 0] for _ in range(count)]

    write_token_folder(
        folder,
        train=documents(30),
        held_out=documents(3),
        vocab_size=VOCAB_SIZE,
        end_of_text_id=0,
        tokenizer_json=b"{}",
        source="a walk",
    )
    return open_token_folder(folder, model_vocab_size=VOCAB_SIZE)


def filled_stage(config: Config, layers: StageLayers, device: torch.device | str = "cpu") -> Stage:
    """A stage with version 0 of its weights."""
    layout = Layout.of(config)
    stage = Stage.empty(config.model, layers, device)
    leaves = dict(stage.named_parameters())
    with torch.no_grad():
        for item in layout.stage_chunks(layers):
            values = initial_chunk(config, layout, item.chunk)
            leaves[item.parameter].view(-1).narrow(0, item.chunk.offset, item.chunk.num_elements).copy_(values)
    return stage
