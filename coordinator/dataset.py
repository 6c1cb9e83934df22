"""What the coordinator must know of the token folder, without torch: its digest and its tokenizer's (see `shardlane.data`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from shardlane.config import Config
from shardlane.errors import DataError
from shardlane.storage import Location, file_size, locate

_NOT_DIGESTED = ("source", "unigram_entropy_nats")  # for people: not what training sees


@dataclass(frozen=True, slots=True)
class Dataset:
    path: Location
    digest: str
    tokenizer_hash: str


def read_dataset(config: Config, run_dir: Path) -> Dataset:
    """Reads the index and looks at the files' sizes; who trains on them checks their bytes. Raises `DataError`."""
    folder = locate(config.data.path or str(run_dir / "data"))
    try:
        values = json.loads((folder / "index.json").read_bytes())
        essential = {key: value for key, value in values.items() if key not in _NOT_DIGESTED}
        tokenizer, vocab_size, token_bytes = values["tokenizer_sha256"], values["vocab_size"], _TOKEN_BYTES[values["dtype"]]
        sizes = {f"{split}.bin": values[split]["num_tokens"] * token_bytes for split in ("train", "held_out")}
    except FileNotFoundError as error:
        raise DataError(
            f"there is no token folder {folder}; run `shardlane prepare`, or set data.path to a prepared one"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {folder / 'index.json'}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'index.json'} is not the index of a token folder; run `shardlane prepare` again") from error
    if vocab_size > config.model.vocab_size:
        raise DataError(
            f"{folder} has a vocabulary of {vocab_size} tokens, but model.vocab_size is {config.model.vocab_size};"
            " raise model.vocab_size, or run `shardlane prepare` into another folder"
        )
    for name, expected in sizes.items():
        _check_size(folder / name, expected)
    return Dataset(folder, hashlib.sha256(json.dumps(essential, sort_keys=True).encode()).hexdigest(), tokenizer)


_TOKEN_BYTES = {"uint16": 2, "uint32": 4}


def _check_size(file: Location, expected: int) -> None:
    try:
        found = file_size(file)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; run `shardlane prepare` again") from error
    if found != expected:
        state = "truncated" if found < expected else "too long"
        raise DataError(f"{file} is {state}: found {found} bytes, the index says {expected}; run `shardlane prepare` again")
