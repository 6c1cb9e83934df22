"""Version 0 is the same values whoever computes them, however the chunks are cut."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardlane.config import Config, build
from shardlane.errors import CheckpointError
from shardlane.initialise import BLOCK_ELEMENTS, initial_chunk, initial_values
from shardlane.partition import EMBEDDING, HEAD, Chunk, Layout

# Sizes that are multiples of nothing convenient: rows, blocks and chunks end in different places.
SHAPE = {"vocab_size": 3001, "hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4}


def configured(**changes: object) -> Config:
    return build({"model": SHAPE}).with_changes(changes)


def whole_tensors(config: Config) -> dict[str, Tensor]:
    """Every tensor of the model, joined from `initial_chunk` of its chunks."""
    layout = Layout.of(config)
    parts: dict[int, list[Tensor]] = {}
    for chunk in layout.chunks:
        parts.setdefault(chunk.tensor, []).append(initial_chunk(config, layout, chunk))
    return {layout.tensors[index].name: torch.cat(each).view(layout.tensors[index].shape) for index, each in parts.items()}


def test_values_do_not_depend_on_chunk_borders() -> None:
    whole = whole_tensors(configured())
    assert whole[EMBEDDING].numel() > 3 * BLOCK_ELEMENTS, "the test must cross blocks"
    for chunk_bytes in (1 << 10, 40_000 // 64 * 64, 4 * BLOCK_ELEMENTS, 5 * BLOCK_ELEMENTS + 64):
        cut = whole_tensors(configured(**{"numerics.chunk_bytes": chunk_bytes}))
        assert cut.keys() == whole.keys()
        assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_values_depend_on_seed_and_name_alone() -> None:
    first, second = whole_tensors(configured()), whole_tensors(configured(**{"train.seed": 4321}))
    matrices = [name for name in first if first[name].dim() > 1]
    assert not any(torch.equal(first[name], second[name]) for name in matrices)
    gate, up = (first[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert not torch.equal(gate, up)
    deeper = whole_tensors(configured(**{"model.num_hidden_layers": 4}))
    assert torch.equal(deeper[EMBEDDING], first[EMBEDDING])


def test_moments_of_the_distribution() -> None:
    for name, values in whole_tensors(configured()).items():
        if values.dim() == 1:
            assert torch.equal(values, torch.ones_like(values)), name
            continue
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        unit = values.double() / (0.02 / math.sqrt(2 * 3) if into_stream else 0.02)
        tolerance = 5 / math.sqrt(unit.numel())  # five standard errors, of a mean over independent draws
        assert abs(unit.mean()) < tolerance, name
        assert abs(unit.square().mean() - 1) < tolerance * math.sqrt(2), name
        assert abs(unit.pow(4).mean() - 3) < tolerance * math.sqrt(96), name
        assert abs((unit.flatten()[1:] * unit.flatten()[:-1]).mean()) < tolerance, name


def test_a_block_has_no_value_twice() -> None:
    config = configured()
    layout = Layout.of(config)
    chunk = Chunk(layout.chunks[0].id, 0, 0, 3 * BLOCK_ELEMENTS)
    values = initial_values(config, layout, chunk)
    # Normals at fp32 collide by chance (the birthday problem), whole runs of them do not.
    pairs = torch.stack((values[:-1], values[1:]), dim=1)
    assert len(pairs.unique(dim=0)) == len(pairs)
    assert values.isfinite().all()


def test_the_raw_stream_is_what_numpy_guarantees() -> None:
    """Integers, so no golden float: the first draws of a Philox key, which NEP 19 fixes for ever."""
    import numpy as np

    philox = np.random.Philox(key=[1, 2], counter=[0, 3, 0, 0])
    first = philox.random_raw(8)
    again = np.random.Philox(key=[1, 2], counter=[0, 3, 0, 0])
    assert (again.random_raw(3) == first[:3]).all()
    assert (again.random_raw(5) == first[3:]).all()


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file of the whole model in which tensors take the three readable types in turn."""
    tensors = whole_tensors(configured(**{"train.seed": 99}))
    types = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {name: tensor.to(types[index % 3]) for index, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


@pytest.mark.parametrize("chunk_bytes", [1 << 10, 4 << 20])
def test_init_from_reads_each_chunk_as_fp32(stored: tuple[Path, dict[str, Tensor]], chunk_bytes: int) -> None:
    file, tensors = stored
    read = whole_tensors(configured(**{"checkpoint.init_from": str(file), "numerics.chunk_bytes": chunk_bytes}))
    assert {values.dtype for values in read.values()} == {torch.float32}
    assert all(torch.equal(read[name], tensors[name].float()) for name in tensors)
    assert read.keys() == tensors.keys()


def test_init_from_follows_the_index_of_several_files(stored: tuple[Path, dict[str, Tensor]]) -> None:
    file, tensors = stored
    save_file({HEAD: tensors[HEAD]}, file.with_name("b.safetensors"))
    save_file({name: tensor for name, tensor in tensors.items() if name != HEAD}, file.with_name("a.safetensors"))
    places = {name: "b.safetensors" if name == HEAD else "a.safetensors" for name in tensors}
    index = file.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": places}))
    file.unlink()
    read = whole_tensors(configured(**{"checkpoint.init_from": str(index)}))
    assert all(torch.equal(read[name], tensors[name].float()) for name in tensors)


def test_init_from_gives_memory_of_its_own(stored: tuple[Path, dict[str, Tensor]]) -> None:
    config = configured(**{"checkpoint.init_from": str(stored[0])})
    layout = Layout.of(config)
    initial_chunk(config, layout, layout.chunks[0]).zero_()
    assert initial_chunk(config, layout, layout.chunks[0]).abs().sum() > 0


def test_init_from_says_what_is_wrong(stored: tuple[Path, dict[str, Tensor]]) -> None:
    file, tensors = stored
    config = configured(**{"checkpoint.init_from": str(file)})
    layout = Layout.of(config)

    def refusal(path: Path = file) -> str:
        with pytest.raises(CheckpointError) as caught:
            initial_chunk(config.with_changes({"checkpoint.init_from": str(path)}), layout, layout.chunks[0])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file" in refusal(file.with_name("nowhere.safetensors"))
    assert "No such file" in refusal(file.with_name("nowhere.index.json"))
    file.with_name("bad.json").write_text("{}")
    assert "no index" in refusal(file.with_name("bad.json"))
    save_file({**tensors, EMBEDDING: torch.zeros(3000, 72)}, file)
    assert "shape [3000, 72], the config wants [3001, 72]" in refusal()
    save_file({**tensors, EMBEDDING: torch.zeros(3001, 72, dtype=torch.int8)}, file)
    assert "is I8, expected one of F32, BF16, F16" in refusal()
    save_file({HEAD: tensors[HEAD]}, file)
    assert "has no tensor 'model.embed_tokens.weight'" in refusal()
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot read" in refusal()
