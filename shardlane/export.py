"""Weights as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shardlane.config import Config
from shardlane.errors import CheckpointError, DataError, UserError
from shardlane.partition import BYTES_PER_ELEMENT, HEAD, tensor_specs

END_OF_TEXT = "<|endoftext|>"
FILE_BYTES_MAX = 4_000_000_000  # most tensor bytes of one safetensors file


def export_hugging_face(
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor], config: Config, tokenizer_file: Path | None, out: Path
) -> None:
    """Writes the folder `out`: config.json, generation_config.json, model.safetensors (fp32), and the tokenizer if there is one.

    `tensors` gives every tensor of the model by name, in any order, each with its shape and in memory of its own; an iterable is
    drawn as files are filled, so no more than one file of `FILE_BYTES_MAX` is held. A tied head may be given and is left out.
    `out` must not exist yet, or be empty. Raises `UserError` (`out` is taken, or not writable), `CheckpointError` (tensors do not
    fit the config) or `DataError` (the tokenizer is unreadable, or larger than the vocabulary).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder; export to another one, or remove it first")
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        end_of_text = _write_tokenizer(tokenizer_file, config, partial) if tokenizer_file else None
        _write_json(partial / "config.json", llama_config(config, end_of_text))
        _write_json(partial / "generation_config.json", {"_from_model_config": True, "eos_token_id": end_of_text})
        _write_tensors(pairs, config, partial)
        partial.replace(out)
    except (OSError, SafetensorError) as error:  # the latter of a full disk, too
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the export {out}: {reason}; free the disk, or export to another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def llama_config(config: Config, end_of_text: int | None) -> dict[str, Any]:
    """The model as transformers' `LlamaConfig` names it; `end_of_text` is the id of the token that ends a document."""
    model = config.model
    same_names = set(type(model).model_fields) - {"preset"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **model.model_dump(include=same_names),
        "head_dim": model.head_dim,
        "max_position_embeddings": config.train.seq_len,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": end_of_text,
    }


def read_tokenizer(file: Path, config: Config) -> Tokenizer:
    """Raises `DataError` if it is unreadable, or has more tokens than the model."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception, for a missing file too
        raise DataError(f"cannot read the tokenizer {file}: {error}; bring the run's data back, or set data.path") from error
    if (size := tokenizer.get_vocab_size()) > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {file} has {size} tokens, more than model.vocab_size {config.model.vocab_size};"
            " it is of another run's data"
        )
    return tokenizer


def _write_tokenizer(file: Path, config: Config, folder: Path) -> int | None:
    """Copies the tokenizer; returns the id of its end of text, if it has one."""
    tokenizer = read_tokenizer(file, config)
    shutil.copyfile(file, folder / "tokenizer.json")
    end_of_text: int | None = tokenizer.token_to_id(END_OF_TEXT)
    names = {"eos_token": END_OF_TEXT} if end_of_text is not None else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    _write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": config.train.seq_len})
    return end_of_text


def _write_tensors(pairs: Iterable[tuple[str, Tensor]], config: Config, folder: Path) -> None:
    """One model.safetensors, or several with an index; they are named last, when their number is known."""
    wanted = {spec.name: spec.shape for spec in tensor_specs(config.model)}
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total_bytes = held_bytes = 0

    def write() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in pairs:
        if name == HEAD and config.model.tie_word_embeddings:
            continue
        if wanted.pop(name, None) != tensor.shape:
            raise CheckpointError(f"cannot export {name} {list(tensor.shape)}: given twice, or not a tensor of this config")
        num_bytes = tensor.numel() * BYTES_PER_ELEMENT
        if held and held_bytes + num_bytes > FILE_BYTES_MAX:
            write()
            held_bytes = 0
        held[name] = tensor.detach().to("cpu", torch.float32).contiguous()
        held_bytes, total_bytes = held_bytes + num_bytes, total_bytes + num_bytes
    if wanted:
        raise CheckpointError(f"cannot export: {len(wanted)} tensors are missing, the first is {next(iter(wanted))}")
    write()
    finals = [f"model-{index + 1:05}-of-{len(files):05}.safetensors" for index in range(len(files))]
    if len(files) == 1:
        finals = ["model.safetensors"]
    else:
        places = {name: final for names, final in zip(files, finals, strict=True) for name in names}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": places})
    for index, final in enumerate(finals):
        (folder / f"part-{index}").rename(folder / final)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
