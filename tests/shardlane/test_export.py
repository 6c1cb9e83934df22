"""What we export, transformers loads, and then computes what we compute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import shardlane.export
from shardlane.config import Config, build
from shardlane.errors import CheckpointError, DataError, UserError
from shardlane.export import END_OF_TEXT, export_hugging_face
from shardlane.generate import generate
from shardlane.initialise import initial_chunk
from shardlane.model import Stage, whole_model
from shardlane.partition import EMBEDDING, FINAL_NORM, HEAD, Layout


def tiny(**changes: Any) -> Config:
    """Wide initial weights and a strange theta and eps, so that a lost field shows in the logits."""
    model = {"preset": "tiny", "initializer_range": 0.2, "rope_theta": 30_000.0, "rms_norm_eps": 1e-3, **changes}
    return build({"model": model})


def whole_tensors(config: Config) -> dict[str, Tensor]:
    layout = Layout.of(config)
    parts: dict[int, list[Tensor]] = {}
    for chunk in layout.chunks:
        parts.setdefault(chunk.tensor, []).append(initial_chunk(config, layout, chunk))
    return {layout.tensors[index].name: torch.cat(each).view(layout.tensors[index].shape) for index, each in parts.items()}


def whole_stage(config: Config, tensors: dict[str, Tensor]) -> Stage:
    stage = Stage.empty(config.model, whole_model(config.model), "cpu")
    stage.load_state_dict({HEAD: tensors[EMBEDDING], **tensors} if config.model.tie_word_embeddings else tensors)
    return stage


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "source-tokenizer.json"))
    return tmp_path / "source-tokenizer.json"


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), f"missing or unexpected: {report}"
    return model.eval()


@pytest.mark.filterwarnings("default")  # transformers' own are not ours to mend
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_transformers_computes_the_same_logits(tmp_path: Path, tied: bool, num_key_value_heads: int) -> None:
    config = tiny(tie_word_embeddings=tied, num_key_value_heads=num_key_value_heads)
    tensors = whole_tensors(config)
    export_hugging_face(tensors, config, None, tmp_path / "out")
    ids = torch.randint(config.model.vocab_size, (2, 200), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        theirs = load(tmp_path / "out")(ids).logits
        ours = whole_stage(config, tensors)(ids)
    assert ours.std() > 0.5, "logits must be far from zero to prove anything"
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.filterwarnings("default")
def test_a_sharded_export_loads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardlane.export, "FILE_BYTES_MAX", 200_000)
    config = tiny()
    tensors = whole_tensors(config)
    export_hugging_face(iter(reversed(tensors.items())), config, None, tmp_path / "out")
    files = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 210_000 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * Layout.of(config).num_parameters
    loaded = load(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    # And it is a version 0 to start from.
    again = whole_tensors(config.with_changes({"checkpoint.init_from": str(tmp_path / "out/model.safetensors.index.json")}))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.filterwarnings("default")
def test_the_tokenizer_goes_along(tmp_path: Path, tokenizer_file: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    config = tiny()
    export_hugging_face(whole_tensors(config), config, tokenizer_file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = Tokenizer.from_file(str(tokenizer_file))
    end = original.token_to_id(END_OF_TEXT)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, end)
    assert tokenizer("def f" + END_OF_TEXT).input_ids == original.encode("def f" + END_OF_TEXT).ids
    assert load(tmp_path / "out").config.eos_token_id == end
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end


def test_a_tied_head_is_not_saved(tmp_path: Path) -> None:
    config = tiny(tie_word_embeddings=True)
    tensors = whole_tensors(config)
    export_hugging_face({**tensors, HEAD: tensors[EMBEDDING]}, config, None, tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as saved:
        assert set(saved.keys()) == tensors.keys()
        assert HEAD not in saved.keys()  # noqa: SIM118  (a safe_open is no mapping)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_nothing_is_left_of_a_failed_export(tmp_path: Path, tokenizer_file: Path) -> None:
    config, out = tiny(), tmp_path / "out"
    tensors = whole_tensors(config)
    without_norm = {name: tensor for name, tensor in tensors.items() if name != FINAL_NORM}

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield EMBEDDING, tensors[EMBEDDING]
        raise CheckpointError("the shard went away")

    with pytest.raises(CheckpointError, match=f"1 tensors are missing, the first is {FINAL_NORM}"):
        export_hugging_face(without_norm, config, None, out)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \[63\]"):
        export_hugging_face({**tensors, FINAL_NORM: torch.ones(63)}, config, None, out)
    with pytest.raises(CheckpointError, match="given twice"):
        export_hugging_face([*tensors.items(), *tensors.items()], config, None, out)
    with pytest.raises(CheckpointError, match="went away"):
        export_hugging_face(broken(), config, None, out)
    with pytest.raises(DataError, match=r"more than model\.vocab_size 100"):
        export_hugging_face(tensors, tiny(vocab_size=100), tokenizer_file, out)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        export_hugging_face(tensors, config, tmp_path / "nowhere.json", out)
    assert list(tmp_path.iterdir()) == [tokenizer_file]


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    config, out = tiny(), tmp_path / "out"
    out.mkdir()
    export_hugging_face(whole_tensors(config), config, None, out)  # into an empty folder
    with pytest.raises(UserError, match="already exists"):
        export_hugging_face(whole_tensors(config), config, None, out)
    with pytest.raises(UserError, match="already exists"):
        export_hugging_face(whole_tensors(config), config, None, out / "config.json")


def test_generation_repeats_by_its_seed_and_ends_at_its_number_of_tokens() -> None:
    config = tiny()
    stage = whole_stage(config, whole_tensors(config))
    prompt = [5, 6, 7]
    first, again, other = (generate(stage, prompt, num_tokens=20, seq_len=16, top_k=50, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 20
    assert prompt == [5, 6, 7]


def test_greedy_generation_takes_the_likeliest_of_a_cropped_context() -> None:
    config = tiny()
    stage = whole_stage(config, whole_tensors(config))
    ids = [3, 1, 4, 1, 5]
    for _ in range(6):
        with torch.inference_mode():
            ids.append(int(stage(torch.tensor([ids[-4:]]))[0, -1].argmax()))
    for greedy in ({"temperature": 0.0}, {"top_k": 1, "temperature": 3.0}):
        assert generate(stage, ids[:5], num_tokens=6, seq_len=4, **greedy) == ids[5:]  # type: ignore[arg-type]


def test_generation_refuses_a_prompt_that_is_not_of_this_model() -> None:
    config = tiny()
    stage = Stage.empty(config.model, whole_model(config.model), "cpu")
    with pytest.raises(UserError, match="empty"):
        generate(stage, [], num_tokens=1, seq_len=4)
    with pytest.raises(UserError, match=r"outside 0\.\.511"):
        generate(stage, [512], num_tokens=1, seq_len=4)
