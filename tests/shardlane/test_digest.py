"""The digest speaks of values by name and of nothing else; whole tensors come back in their shapes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from shardlane.config import Config
from shardlane.digest import checkpoint_digest, read_tensors, state_digest
from shardlane.errors import CheckpointError
from shardlane.manifest import tensor_names
from shardlane.partition import Layout
from tests.shardlane.checkpoints import deal, flip, small_config, state, write_checkpoint


def whole(config: Config, name: str) -> dict[str, torch.Tensor]:
    """Every tensor joined the plain way."""
    layout = Layout.of(config)
    return {
        tensor.name: torch.cat([state(config, c.id)[name] for c in layout.chunks if c.tensor == tensor.index]).view(tensor.shape)
        for tensor in layout.tensors
    }


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_the_digest_is_what_the_design_says(tmp_path: Path, optimizer: str) -> None:
    config = small_config(optimizer__name=optimizer)
    stream = b"".join(
        tensor.numpy().astype("<f4").tobytes()
        for name in ["parameter", *sorted(set(tensor_names(optimizer)) - {"parameter"})]
        for _, tensor in sorted(whole(config, name).items())
    )
    expected = hashlib.sha256(stream + (98).to_bytes(8, "little")).hexdigest()
    assert checkpoint_digest(write_checkpoint(tmp_path, config, optimizer_step=98)) == expected
    in_memory = state_digest(Layout.of(config), tensor_names(optimizer), lambda chunk, name: state(config, chunk)[name], 98)
    assert in_memory == expected


def test_placement_and_provenance_leave_no_trace(tmp_path: Path) -> None:
    config = small_config()
    assert len(deal(config, 1)[0]) > len(Layout.of(config).tensors)  # some tensors have several chunks
    digests = {
        checkpoint_digest(write_checkpoint(tmp_path / str(num), config, num_parts=num, run_id=f"run-{num}", timeline=num))
        for num in (1, 2, 3, 7)
    }
    assert len(digests) == 1


def test_one_bit_one_step_or_another_state_changes_it(tmp_path: Path) -> None:
    config = small_config()
    layout, names = Layout.of(config), tensor_names("adamw")

    def digest(step: int = 1, swap: bool = False, bit: bool = False) -> str:
        def read(chunk: int, name: str) -> torch.Tensor:
            values = state(config, layout.chunks[chunk].id)
            other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}.get(name, name) if swap else name
            tensor = values[other].clone()
            if bit and chunk == 3 and name == "exp_avg_sq":
                tensor.view(torch.int32)[5] ^= 1
            return tensor

        return state_digest(layout, names, read, step)

    assert len({digest(), digest(step=2), digest(swap=True), digest(bit=True)}) == 4
    assert digest() == state_digest(layout, tuple(reversed(names)), lambda chunk, name: state(config, chunk)[name], 1)


def test_a_damaged_checkpoint_has_no_digest(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, small_config())
    flip(folder / "part-shard-1.safetensors", -5)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        checkpoint_digest(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_come_back_whole_and_a_tied_one_once(tmp_path: Path, tied: bool) -> None:
    config = small_config(model__tie_word_embeddings=tied)
    found = list(read_tensors(write_checkpoint(tmp_path, config, num_parts=3)))
    expected = whole(config, "parameter")
    assert [name for name, _ in found] == list(expected)
    assert ("lm_head.weight" in expected) is not tied
    assert all(tensor.shape == expected[name].shape and torch.equal(tensor, expected[name]) for name, tensor in found)
