"""The token file format: what is written is what is read, and a folder that is not what its index says is named as such."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlane.data import TokenFolder, open_token_folder, unigram_cross_entropy, write_token_folder
from shardlane.errors import DataError

TRAIN = [[5, 6, 7, 0], [8, 9, 0], [1, 2, 3, 4, 0]]
HELD_OUT = [[5, 5, 9, 0]]


def write(folder: Path, train: list[list[int]] = TRAIN, held_out: list[list[int]] = HELD_OUT, vocab_size: int = 10) -> Path:
    folder.mkdir()
    write_token_folder(
        folder, train=train, held_out=held_out, vocab_size=vocab_size, end_of_text_id=0, tokenizer_json=b"{}", source="a test"
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


def reopen(folder: Path, model_vocab_size: int = 10, verify: bool = True) -> TokenFolder:
    return open_token_folder(folder, model_vocab_size=model_vocab_size, verify=verify)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        reopen(folder, **options)
    message = str(caught.value)
    assert "\n" not in message, "a person reads one line"
    return message


documents = st.lists(st.lists(st.integers(0, 99_999), max_size=20).map(lambda ids: [*ids, 0]), min_size=1, max_size=10)


@settings(deadline=None)  # files
@given(train=documents, held_out=documents, vocab_size=st.sampled_from([100_000, 1 << 16]), seq_len=st.integers(1, 9))
def test_windows_are_consecutive_slices_of_the_text(
    train: list[list[int]], held_out: list[list[int]], vocab_size: int, seq_len: int
) -> None:
    train = [[token % vocab_size for token in document] for document in train]
    held_out = [[token % vocab_size for token in document] for document in held_out]
    with tempfile.TemporaryDirectory() as parent:
        opened = reopen(write(Path(parent) / "data", train, held_out, vocab_size), vocab_size)
        for file, expected in ((opened.train, train), (opened.held_out, held_out)):
            assert [file.document(i).tolist() for i in range(file.num_documents)] == expected
            text = [token for document in expected for token in document]
            assert file.num_tokens == len(text)
            if len(text) <= seq_len:
                with pytest.raises(DataError, match="one window"):
                    file.num_windows(seq_len)
                continue
            ids = list(reversed(range(file.num_windows(seq_len))))
            windows = file.windows(ids, seq_len)
            assert windows.dtype == torch.int64 and windows.shape == (len(ids), seq_len + 1)
            assert windows.tolist() == [text[w * seq_len : w * seq_len + seq_len + 1] for w in ids]


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path, vocab_size: int, token_bytes: int) -> None:
    largest = vocab_size - 1
    folder = write(tmp_path / "data", [[largest, 0]], vocab_size=vocab_size)
    assert (folder / "train.bin").read_bytes() == largest.to_bytes(token_bytes, "little") + bytes(token_bytes)
    assert reopen(folder, vocab_size).train.windows([0], 1).tolist() == [[largest, 0]]


def test_the_digest_is_of_the_tokens_and_not_of_their_origin(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / name) for name in ("one", "same", "other"))
    edit_index(same, lambda index: index.update(source="elsewhere"))
    (tmp_path / "moved").mkdir()
    same = same.rename(tmp_path / "moved" / "data")
    other = write(tmp_path / "another", [[5, 6, 7, 0], [8, 9, 1, 0], [2, 3, 4, 0]])  # as long, one border elsewhere
    assert reopen(one).digest == reopen(same).digest != reopen(other).digest


def test_unigram_entropy_is_the_loss_of_knowing_frequencies_alone(folder: Path) -> None:
    # train: 12 tokens, of which 0 three times and the others once; smoothed over the 10 of the vocabulary
    probability = {0: 4 / 22, 5: 2 / 22, 9: 2 / 22}
    expected = -sum(math.log(probability[token]) for token in HELD_OUT[0]) / 4
    assert reopen(folder).unigram_entropy == pytest.approx(expected)


def test_a_token_that_training_never_saw_costs_a_finite_loss() -> None:
    entropy = unigram_cross_entropy(np.array([3, 0]), np.array([0, 1]))
    assert entropy == pytest.approx(math.log(5))


def test_nothing_held_out_is_a_folder_without_an_entropy(tmp_path: Path) -> None:
    opened = reopen(write(tmp_path / "data", held_out=[]))
    assert opened.unigram_entropy is None
    assert opened.held_out.num_tokens == opened.held_out.num_documents == 0
    with pytest.raises(DataError, match="holds 0 tokens"):
        opened.held_out.num_windows(4)


def test_too_few_tokens_for_one_window(folder: Path) -> None:
    train = reopen(folder).train
    assert train.num_windows(11) == 1
    with pytest.raises(DataError, match=r"holds 12 tokens, but one window of train\.seq_len 12 takes 13; shorten"):
        train.num_windows(12)


@pytest.mark.parametrize("window", [-1, 3])
def test_a_window_outside_the_file_is_a_bug(folder: Path, window: int) -> None:
    with pytest.raises(ValueError, match="expected 0 … 2"):
        reopen(folder).train.windows([0, window], 3)


def test_missing_folder(tmp_path: Path) -> None:
    assert "there is no token folder" in (message := refusal(tmp_path / "nowhere")) and "`shardlane prepare`" in message


FILES = ["index.json", "tokenizer.json", "train.bin", "train.offsets.bin", "held_out.bin", "held_out.offsets.bin"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder: Path, name: str, verify: bool) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in (message := refusal(folder, verify=verify)) and "`shardlane prepare`" in message


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES[2:])
def test_truncated_file(folder: Path, name: str, verify: bool) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    assert f"is truncated: found {len(content) - 1} bytes, index.json says {len(content)}" in refusal(folder, verify=verify)
    (folder / name).write_bytes(content + b"\0")
    assert "is too long" in refusal(folder, verify=verify)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_changed_byte_is_found_by_its_hash(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} was changed: its SHA-256 is" in refusal(folder)
    reopen(folder, verify=False)  # trusted by who asks for speed


def test_a_vocabulary_larger_than_the_models(folder: Path) -> None:
    assert "a vocabulary of 10 tokens, but model.vocab_size is 9; raise" in refusal(folder, model_vocab_size=9)
    reopen(folder, model_vocab_size=11)  # spare rows of the embedding do no harm


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_unknown_format_version(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(format_version=2, new_key=1))
    assert "has format version 2, this Shardlane reads 1" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda index: index.update(dtype="float64"), "dtype is 'float64'"),
        (lambda index: index["train"].update(num_tokens=-1), "train.num_tokens is -1"),
        (lambda index: index["held_out"].update(sha256="../../etc"), "held_out.sha256 is '../../etc'"),
        (lambda index: index.pop("vocab_size"), "vocab_size"),
    ],
)
def test_an_index_that_breaks_its_contract_names_the_key(
    folder: Path, change: Callable[[dict[str, Any]], None], found: str
) -> None:
    edit_index(folder, change)
    assert found in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"{}", b"7"])
def test_an_index_that_is_none(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    assert "is not the index of a token folder" in refusal(folder)


def test_a_folder_is_never_written_over(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        write_token_folder(folder, train=TRAIN, held_out=[], vocab_size=10, end_of_text_id=0, tokenizer_json=b"", source="again")
    reopen(folder)
