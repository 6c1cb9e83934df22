"""metrics.jsonl and the token folder's index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.core.events import TrainingRow, ValidationRow
from coordinator.dataset import read_dataset
from coordinator.metrics_file import MetricsFile
from shardlane.errors import DataError
from shardlane.ids import Version
from tests.coordinator.cast import small_config, summary, write_token_folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(path: Path, num_steps: int) -> MetricsFile:
    file = MetricsFile(path)
    for step in range(num_steps):
        file.append(TrainingRow(summary(step), 100.0))
        file.append(ValidationRow(Version(step + 1), 4.0))
    file.flush()
    return file


def test_rows_have_the_names_that_people_know(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(TrainingRow(summary(0), 123.4567))
    file.append(TrainingRow(replace(summary(1), loss=math.nan, skipped=True, refused=True), 5.0))
    file.append(ValidationRow(Version(2), 4.5))
    assert (file.version, file.num_pending) == (0, 3)
    file.flush()
    assert (file.version, file.num_pending) == (2, 0)
    first = {"step": 0, "loss": 5.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 32, "tokens_per_second": 123.457}
    second = {
        "step": 1,
        "loss": None,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 32,
        "tokens_per_second": 5.0,
        "skipped": True,
        "refused": True,
    }
    assert rows(tmp_path / "metrics.jsonl") == [first, second, {"step": 2, "val_loss": 4.5}]


def test_a_restart_goes_on_behind_the_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 3)
    with path.open("ab") as torn:
        torn.write(b'{"step": 3, "lo')
    file = MetricsFile(path)
    assert file.version == 3 and file.validations == {1: 4.0, 2: 4.0, 3: 4.0}
    file.append(TrainingRow(summary(3), 1.0))
    file.flush()
    assert [row["step"] for row in rows(path) if "loss" in row] == [0, 1, 2, 3]


def test_a_resume_forgets_what_lies_beyond_its_version(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, 4)
    file = MetricsFile(path, Version(2))
    assert file.version == 2 and file.validations == {1: 4.0, 2: 4.0}
    assert [row["step"] for row in rows(path) if "loss" in row] == [0, 1]
    file.append(TrainingRow(summary(2), 1.0))
    file.drop_after(Version(1))  # rows that are not written yet go as well
    file.flush()
    assert [row["step"] for row in rows(path)] == [0, 1]


def test_a_full_disk_leaves_no_half_row_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    file = fill(path, 1)
    before = path.read_bytes()
    file.append(TrainingRow(summary(1), 1.0))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shardlane.files.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.flush()
    assert path.read_bytes() == before and (file.version, file.num_pending) == (1, 1)
    file.flush()
    assert file.version == 2 and len(rows(path)) == 3


def test_the_digest_is_the_one_that_the_workers_find(tmp_path: Path, run_python: Callable[[str], str]) -> None:
    write_token_folder(tmp_path / "data")
    found = read_dataset(small_config(), tmp_path)
    code = "from shardlane.data import Index; import pathlib, sys; "
    path = str(tmp_path / "data" / "index.json")
    assert (
        run_python(f"{code}print(Index.model_validate_json(pathlib.Path({path!r}).read_bytes()).digest())").strip()
        == found.digest
    )
    assert (found.path, found.tokenizer_hash) == (tmp_path / "data", "1" * 64)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "index.json").unlink(), "there is no token folder"),
        (lambda folder: (folder / "index.json").write_text("{"), "is not the index of a token folder"),
        (lambda folder: (folder / "train.bin").write_bytes(b"12"), "train.bin is truncated: found 2 bytes"),
        (lambda folder: (folder / "held_out.bin").unlink(), "held_out.bin"),
    ],
)
def test_a_broken_token_folder_is_one_line(tmp_path: Path, harm: Callable[[Path], object], says: str) -> None:
    write_token_folder(tmp_path / "data")
    harm(tmp_path / "data")
    with pytest.raises(DataError, match=says) as caught:
        read_dataset(small_config(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_the_model_has_no_embeddings_for(tmp_path: Path) -> None:
    write_token_folder(tmp_path / "data", vocab_size=65)
    with pytest.raises(DataError, match=r"vocabulary of 65 tokens, but model.vocab_size is 64"):
        read_dataset(small_config(), tmp_path)
