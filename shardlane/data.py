"""The token file format: how a folder of token ids is written, checked and read.

    index.json                     `Index`: format version, dtype, sizes, SHA-256 of every other file
    tokenizer.json                 the `tokenizers` library's file
    train.bin     held_out.bin     token ids, little-endian, `dtype`; documents one after the other, each with its end-of-text id
    *.offsets.bin                  little-endian uint64, num_documents + 1: where each document begins, then num_tokens

Training cuts the stream into windows: window w of length `seq_len` covers the tokens w·seq_len … w·seq_len + seq_len
inclusive, inputs and targets at once, so neighbours share one token. `shardlane.samples` says which windows and when.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardlane.errors import DataError
from shardlane.storage import Location

FORMAT_VERSION: Final = 1
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
_OFFSET_DTYPE = np.dtype("<u8")
_COUNTED_AT_ONCE = 1 << 22  # tokens brought into memory by one pass over a whole file
_AGAIN = "delete the folder and run `shardlane prepare` again"

Split = Literal["train", "held_out"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitIndex(_Record):
    """What the index says of one split."""

    num_tokens: int = Field(ge=0)
    num_documents: int = Field(ge=0)
    sha256: Sha256
    offsets_sha256: Sha256


class Index(_Record):
    """`index.json`."""

    format_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, description="the largest token id of the tokenizer, plus one")
    end_of_text_id: int = Field(ge=0)
    tokenizer_sha256: Sha256
    train: SplitIndex
    held_out: SplitIndex
    source: str = Field(description="for people: where the text came from")
    unigram_entropy_nats: float | None = Field(description="see `unigram_cross_entropy`; null without held-out tokens")

    def digest(self) -> str:
        """SHA-256 over all that training can see; not over where the text once lay."""
        essential = self.model_dump(exclude={"source", "unigram_entropy_nats"})
        return hashlib.sha256(json.dumps(essential, sort_keys=True).encode()).hexdigest()


class TokenFile:
    """One split, memory-mapped: opening it costs no memory, and reads touch only the windows asked for."""

    def __init__(self, path: Path, tokens: Tokens, offsets: NDArray[np.uint64]) -> None:
        self.path = path
        self._tokens = tokens
        self._offsets = offsets

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    def num_windows(self, seq_len: int) -> int:
        """Windows of `seq_len` inputs and as many targets. Raises `DataError` if there is not even one."""
        count = (self.num_tokens - 1) // seq_len
        if count < 1:
            raise DataError(
                f"{self.path} holds {self.num_tokens} tokens, but one window of train.seq_len {seq_len} takes {seq_len + 1};"
                " shorten train.seq_len, or give more text to `shardlane prepare`"
            )
        return count

    def windows(self, ids: Sequence[int], seq_len: int) -> torch.Tensor:
        """The windows `ids`: int64 [len(ids), seq_len + 1]. Raises `ValueError` for an id that is not in the file."""
        count = self.num_windows(seq_len)
        rows = np.empty((len(ids), seq_len + 1), dtype=np.int64)
        for row, window in zip(rows, ids, strict=True):
            if not 0 <= window < count:  # a slice would quietly come back short, or from the wrong end
                raise ValueError(f"window {window} is not in {self.path}: expected 0 … {count - 1}")
            row[:] = self._tokens[window * seq_len : (window + 1) * seq_len + 1]
        return torch.from_numpy(rows)

    def document(self, index: int) -> torch.Tensor:
        """Document `index` with its end-of-text id: int64 [its tokens]."""
        first, after = int(self._offsets[index]), int(self._offsets[index + 1])
        return torch.from_numpy(self._tokens[first:after].astype(np.int64))


@dataclass(frozen=True)
class TokenFolder:
    """A prepared folder whose files are what its index says."""

    path: Path
    index: Index
    train: TokenFile
    held_out: TokenFile

    @property
    def digest(self) -> str:
        """The data hash: runs with equal config and equal data hash see the same samples."""
        return self.index.digest()

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER_FILE

    @property
    def tokenizer_hash(self) -> str:
        return self.index.tokenizer_sha256

    @property
    def unigram_entropy(self) -> float | None:
        """Nats a token: the held-out loss of a model that knows token frequencies and nothing else. None: nothing held out."""
        return self.index.unigram_entropy_nats


def open_token_folder(path: str | Path, *, model_vocab_size: int, verify: bool = True) -> TokenFolder:
    """Opens a prepared folder. Sizes are always checked; `verify` also reads every byte and compares hashes.

    Raises `DataError`: a missing folder or file, another format version, a file shorter or longer than the index says, a
    hash that differs, or a vocabulary that the model has no embeddings for.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"there is no token folder {folder}; run `shardlane prepare`, or set data.path to a prepared one")
    index = _read_index(folder / INDEX_FILE)
    if index.vocab_size > model_vocab_size:
        raise DataError(
            f"{folder} has a vocabulary of {index.vocab_size} tokens, but model.vocab_size is {model_vocab_size};"
            " raise model.vocab_size, or run `shardlane prepare` into another folder"
        )
    _check_file(folder / TOKENIZER_FILE, None, index.tokenizer_sha256 if verify else None)
    return TokenFolder(folder, index, _open_split(folder, "train", index, verify), _open_split(folder, "held_out", index, verify))


def write_token_folder(
    folder: Path,
    *,
    train: Iterable[Sequence[int]],
    held_out: Iterable[Sequence[int]],
    vocab_size: int,
    end_of_text_id: int,
    tokenizer_json: bytes,
    source: str,
) -> Index:
    """Fills the existing, empty `folder` from documents of token ids, each of which ends with `end_of_text_id`.

    Every file is on disk when this returns, the index last. It is not atomic: `shardlane.prepare` renames the folder into place.
    """
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
    _write_synced(folder / TOKENIZER_FILE, [tokenizer_json])
    train_index, held_out_index = _write_split(folder, "train", train, dtype), _write_split(folder, "held_out", held_out, dtype)
    train_counts, held_out_counts = (
        _count_tokens(_map(folder / f"{split}.bin", _token_dtype(dtype)), vocab_size) for split in ("train", "held_out")
    )
    index = Index(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        end_of_text_id=end_of_text_id,
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
        train=train_index,
        held_out=held_out_index,
        source=source,
        unigram_entropy_nats=unigram_cross_entropy(train_counts, held_out_counts),
    )
    _write_synced(folder / INDEX_FILE, [index.model_dump_json(indent=2).encode() + b"\n"])
    return index


def unigram_cross_entropy(train_counts: NDArray[np.int64], held_out_counts: NDArray[np.int64]) -> float | None:
    """Nats a held-out token under the training split's token frequencies, add-one smoothed; None without held-out tokens.

    Both are int64 [vocab_size]. Smoothing, because a token that training never saw would make it infinite.
    """
    num_held_out = int(held_out_counts.sum())
    if not num_held_out:
        return None
    log_total = math.log(int(train_counts.sum()) + len(train_counts))
    return math.fsum(held_out_counts * (log_total - np.log1p(train_counts))) / num_held_out


def file_sizes(index: Index) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file of tokens, by name."""
    dtype = _token_dtype(index.dtype)
    found = {}
    for split, entry in (("train", index.train), ("held_out", index.held_out)):
        found[f"{split}.bin"] = entry.num_tokens * dtype.itemsize, entry.sha256
        found[f"{split}.offsets.bin"] = (entry.num_documents + 1) * _OFFSET_DTYPE.itemsize, entry.offsets_sha256
    return found


def _token_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def _read_index(path: Path) -> Index:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        _missing(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give this user the right to read it") from error
    return parse_index(content, path)


def parse_index(content: bytes, path: Location) -> Index:
    """Of an `index.json`. Raises `DataError`, which names `path`."""
    try:
        values = json.loads(content)
        version = values["format_version"]
    except (ValueError, TypeError, KeyError) as error:  # not JSON, not an object, not ours
        raise DataError(f"{path} is not the index of a token folder; {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version!r}, this Shardlane reads {FORMAT_VERSION}; {_AGAIN}")
    try:
        return Index.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key} is {first['input']!r}: {first['msg']}; {_AGAIN}") from error


def _open_split(folder: Path, split: Split, index: Index, verify: bool) -> TokenFile:
    path, offsets_path = folder / f"{split}.bin", folder / f"{split}.offsets.bin"
    for file in (path, offsets_path):
        num_bytes, sha256 = file_sizes(index)[file.name]
        _check_file(file, num_bytes, sha256 if verify else None)
    return TokenFile(path, _map(path, _token_dtype(index.dtype)), _map(offsets_path, _OFFSET_DTYPE))


def _check_file(path: Path, num_bytes: int | None, sha256: str | None) -> None:
    """Raises `DataError` unless the file is there, readable, of that size and with that hash; None: any will do."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if num_bytes is not None and size != num_bytes:
                state = "truncated" if size < num_bytes else "too long"
                raise DataError(f"{path} is {state}: found {size} bytes, {INDEX_FILE} says {num_bytes}; {_AGAIN}")
            if sha256 is not None and (found := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
                raise DataError(f"{path} was changed: its SHA-256 is {found[:12]}…, {INDEX_FILE} says {sha256[:12]}…; {_AGAIN}")
    except FileNotFoundError:
        _missing(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give this user the right to read it") from error


def _missing(path: Path) -> NoReturn:
    raise DataError(f"{path} is missing, so {path.parent} is not a whole token folder; {_AGAIN}") from None


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.stat().st_size:  # nothing held out; an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _count_tokens(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(tokens), _COUNTED_AT_ONCE):
        counts += np.bincount(tokens[first : first + _COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def _write_split(folder: Path, split: Split, documents: Iterable[Sequence[int]], dtype: str) -> SplitIndex:
    offsets = [0]

    def token_bytes() -> Iterable[bytes]:
        for document in documents:
            offsets.append(offsets[-1] + len(document))
            yield np.asarray(document, dtype=_token_dtype(dtype)).tobytes()

    sha256 = _write_synced(folder / f"{split}.bin", token_bytes())
    offsets_sha256 = _write_synced(folder / f"{split}.offsets.bin", [np.asarray(offsets, _OFFSET_DTYPE).tobytes()])
    return SplitIndex(num_tokens=offsets[-1], num_documents=len(offsets) - 1, sha256=sha256, offsets_sha256=offsets_sha256)


def _write_synced(path: Path, pieces: Iterable[bytes]) -> str:
    """Writes a new file through to the disk; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
