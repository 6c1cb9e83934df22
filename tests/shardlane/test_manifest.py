"""Which checkpoints there are, which of them a config may resume, and that half a one is none."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId, RunId, Version
from shardlane.manifest import (
    MANIFEST,
    Manifest,
    PartReport,
    build_manifest,
    check_resume,
    layout_of,
    list_complete,
    newest_complete,
    prune,
    read_complete,
    read_manifest,
)
from shardlane.partition import Layout
from tests.shardlane.checkpoints import commit, deal, flip, small_config, write_checkpoint, write_part

CONFIG = small_config()
NUM_CHUNKS = len(Layout.of(CONFIG).chunks)


def checksums(*names: str, value: int = 7) -> dict[str, str]:
    return dict.fromkeys(names or ("parameter", "exp_avg", "exp_avg_sq"), f"{value:016x}")


def build(parts: list[PartReport], **facts: Any) -> Manifest:
    defaults: Mapping[str, Any] = {"version": Version(8), "optimizer_step": 8, "run_id": RunId("r1"), "timeline": 0}
    hashes = {"numerics_class": "c", "data_hash": "data-1", "tokenizer_hash": "tokens-1"}
    return build_manifest(CONFIG, parts, **{**defaults, **hashes, **facts})


def part(owner: str, chunks: Mapping[int, dict[str, str]]) -> PartReport:
    return PartReport(f"part-{owner}.safetensors", 64, {ChunkId(chunk): sums for chunk, sums in chunks.items()})


def full_part(owner: str, value: int = 7) -> PartReport:
    return part(owner, {chunk: checksums(value=value) for chunk in range(NUM_CHUNKS)})


def test_the_coordinator_needs_no_torch(run_python: Callable[[str], str]) -> None:
    assert run_python("import sys, shardlane.manifest; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False\n"


def test_a_manifest_comes_back_equal_and_knows_its_layout(tmp_path: Path) -> None:
    manifest = commit(tmp_path, CONFIG, [write_part(tmp_path, "a", CONFIG, deal(CONFIG, 1)[0])])
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path).digest == manifest.digest
    assert layout_of(manifest).chunks == Layout.of(CONFIG).chunks
    assert (manifest.mathematics, manifest.mathematics_hash) == (CONFIG.mathematics(), CONFIG.mathematics_hash())
    assert (manifest.version, manifest.optimizer_step, manifest.timeline) == (100, 98, 3)


def test_parts_are_joined_and_their_order_does_not_matter() -> None:
    parts = [part("a", {chunk: checksums() for chunk in range(9)}), full_part("b"), full_part("a-late")]
    manifest = build(parts)
    assert manifest == build(parts[::-1]) == build([*parts, parts[0]])
    assert [each.file for each in manifest.parts] == ["part-a-late.safetensors"]  # the others hold only copies


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], f"no part holds chunk 0 ({NUM_CHUNKS} of {NUM_CHUNKS} are missing)"),
        ([part("a", dict.fromkeys(range(1, NUM_CHUNKS), checksums()))], f"no part holds chunk 0 (1 of {NUM_CHUNKS} are missing)"),
        (
            [full_part("a"), part("b", {3: checksums(value=8)})],
            "chunk 3 differs between part-a.safetensors and part-b.safetensors; copies of a shard disagree",
        ),
        (
            [part("a", dict.fromkeys(range(NUM_CHUNKS + 1), checksums()))],
            f"{NUM_CHUNKS + 1} chunks are listed, the model has {NUM_CHUNKS}",
        ),
        (
            [part("a", dict.fromkeys(range(NUM_CHUNKS), checksums("parameter")))],
            "chunk 0 has the tensors ['parameter'], expected ['exp_avg', 'exp_avg_sq', 'parameter']",
        ),
    ],
    ids=["none", "missing", "differs", "unknown", "no-states"],
)
def test_reports_that_make_no_checkpoint(parts: list[PartReport], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(parts)
    assert str(caught.value) == f"version 8 is not checkpointed: {reason}"


def test_a_report_cannot_name_a_file_elsewhere() -> None:
    with pytest.raises(CheckpointError, match="version 8 is not checkpointed: part: String should match pattern"):
        build([PartReport("../part-a.safetensors", 64, full_part("a").chunks)])
    with pytest.raises(CheckpointError, match=r"checksums\.exp_avg: String should match pattern"):
        build([part("a", {0: {**checksums(), "exp_avg": "x"}})])


def test_no_manifest_without_its_parts_or_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = write_part(tmp_path, "a", CONFIG, deal(CONFIG, 1)[0])
    with pytest.raises(CheckpointError, match=r"part-b\.safetensors is damaged: it is missing"):
        commit(tmp_path, CONFIG, [PartReport("part-b.safetensors", report.num_bytes, report.chunks)])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=rf"cannot write .*{MANIFEST}: No space left on device"):
        commit(tmp_path, CONFIG, [report])
    assert [file.name for file in tmp_path.iterdir()] == [report.file]


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, CONFIG) / MANIFEST
    size = file.stat().st_size
    for position in [*range(160), *range(160, size, size // 200), size - 1]:
        for mask in (1, 0x20, 0x80, 0x07):  # 0x20 is a letter's case, 0x07 turns a line feed into a carriage return
            flip(file, position, mask)
            with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged: "):
                read_manifest(file.parent)
            flip(file, position, mask)
    read_complete(file.parent)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b'{"checksum": 5}', b"\xff", b'{"checksum": ""}'])
def test_what_is_no_manifest_at_all(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match="is damaged: it"):
        read_manifest(tmp_path)


def test_another_format_is_named(tmp_path: Path) -> None:
    manifest = commit(tmp_path, CONFIG, [write_part(tmp_path, "a", CONFIG, deal(CONFIG, 1)[0])])
    newer = manifest.model_copy(update={"format_version": 2})
    (tmp_path / MANIFEST).write_text(newer.to_json())
    with pytest.raises(CheckpointError, match="has format 2, expected 1; use the Shardlane that wrote it"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer_step": 101}, "optimizer_step 101 is beyond version 100"),
        ({"mathematics_hash": "0"}, "mathematics_hash is not that of mathematics"),
        ({"mathematics": {}, "mathematics_hash": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}, "KeyError"),
        ({"chunks": ()}, "0 chunks are listed"),
        ({"parts": ()}, "chunk 0 lies in part-a.safetensors, which is not listed"),
    ],
)
def test_a_manifest_that_contradicts_itself(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    manifest = commit(tmp_path, CONFIG, [write_part(tmp_path, "a", CONFIG, deal(CONFIG, 1)[0])])
    (tmp_path / MANIFEST).write_text(manifest.model_copy(update=change).to_json())  # its checksum is right
    with pytest.raises(CheckpointError, match=f"is damaged: {reason}"):
        read_manifest(tmp_path)


def test_the_newest_complete_one_is_found_behind_those_that_were_cut_short(tmp_path: Path) -> None:
    folders = {version: write_checkpoint(tmp_path, CONFIG, version=version) for version in (10, 20, 30, 40)}
    (folders[40] / MANIFEST).unlink()
    (folders[30] / MANIFEST).rename(folders[30] / f"{MANIFEST}.tmp")
    os.truncate(folders[10] / "part-shard-0.safetensors", 100)
    (tmp_path / "step-70").mkdir()
    (tmp_path / "step-00000080").write_text("a file")
    assert newest_complete(tmp_path) == folders[20]
    assert list_complete(tmp_path) == [(20, folders[20])]
    assert newest_complete(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: flip(folder / MANIFEST, 90), "does not match its own checksum"),
        (lambda folder: os.truncate(folder / "part-shard-0.safetensors", 100), "it has 100 bytes"),
        (lambda folder: folder.rename(folder.with_name("step-00000060")), "holds version 50; rename it back"),
    ],
    ids=["flipped", "truncated", "renamed"],
)
def test_a_damaged_newest_one_is_an_error_lest_an_older_one_overwrites_it(
    tmp_path: Path, harm: Callable[[Path], object], reason: str
) -> None:
    write_checkpoint(tmp_path, CONFIG, version=40)
    harm(write_checkpoint(tmp_path, CONFIG, version=50))
    with pytest.raises(CheckpointError, match=reason):
        newest_complete(tmp_path)
    assert [version for version, _ in list_complete(tmp_path)] == [40]


def test_prune_keeps_the_newest_and_what_may_still_be_written(tmp_path: Path) -> None:
    folders = {version: write_checkpoint(tmp_path, CONFIG, version=version) for version in (10, 20, 30, 40, 50, 60)}
    for torn in (20, 50, 60):
        (folders[torn] / MANIFEST).unlink()
    os.truncate(folders[30] / "part-shard-0.safetensors", 100)
    (tmp_path / "notes").mkdir()
    assert prune(tmp_path, keep_last=2) == [folders[20]]  # 60 is under way, 50 too: both are newer than the newest, 40
    assert [version for version, _ in list_complete(tmp_path)] == [10, 40]
    assert prune(tmp_path, keep_last=1) == [folders[10], folders[30]]
    assert prune(tmp_path, keep_last=1) == []
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["notes", "step-00000040", "step-00000050", "step-00000060"]
    with pytest.raises(ValueError, match="never removed"):
        prune(tmp_path, keep_last=0)


def test_prune_without_a_complete_one_removes_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    (folder / MANIFEST).unlink()
    assert prune(tmp_path, keep_last=1) == []
    assert folder.exists()


def test_a_removal_cut_short_leaves_a_torn_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (write_checkpoint(tmp_path, CONFIG, version=version) for version in (1, 2))

    def fails(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fails)
        with pytest.raises(CheckpointError, match=r"cannot remove the old .*1: Input/output error"):
            prune(tmp_path, keep_last=1)
    assert (old.exists(), newest_complete(tmp_path), len(list_complete(tmp_path))) == (True, new, 1)
    assert prune(tmp_path, keep_last=1) == [old]


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster.stages": 2, "cluster.replicas": 4, "cluster.shards": 3},
        {"log.level": "debug", "run_name": "other", "train.stop_at_step": 9, "checkpoint.every_steps": 1},
        {"pipeline.schedule": "gpipe", "numerics.determinism": "strict", "validation.every_steps": 5},
    ],
)
def test_shape_logging_and_stop_may_change(changes: dict[str, Any]) -> None:
    check_resume(build([full_part("a")]), CONFIG.with_changes(changes), "data-1", "tokens-1", fork=False)


PUT_BACK = "put it back, or pass --fork-run to begin another run from these weights"


@pytest.mark.parametrize(
    ("changes", "hashes", "difference"),
    [
        ({"train.seed": 7}, ("data-1", "tokens-1"), "train.seed was 1234 and is now 7"),
        ({"schedule.name": "wsd", "train.max_steps": 9}, ("data-1", "tokens-1"), "train.max_steps was 200 and is now 9"),
        ({"optimizer.learning_rate": 0.1}, ("data-1", "tokens-1"), "optimizer.learning_rate was 0.003 and is now 0.1"),
        ({"numerics.precision": "bf16"}, ("data-1", "tokens-1"), "numerics.precision was 'fp32' and is now 'bf16'"),
        ({}, ("data-2", "tokens-1"), "data hash was 'data-1' and is now 'data-2'"),
        ({}, ("data-2", "tokens-2"), "tokenizer hash was 'tokens-1' and is now 'tokens-2'"),
    ],
)
def test_other_mathematics_is_refused_unless_forked(changes: dict[str, Any], hashes: tuple[str, str], difference: str) -> None:
    manifest, config = build([full_part("a")]), CONFIG.with_changes(changes)
    with pytest.raises(CheckpointError) as caught:
        check_resume(manifest, config, *hashes, fork=False)
    assert str(caught.value) == f"cannot resume run r1 at version 8: {difference}; {PUT_BACK}"
    check_resume(manifest, config, *hashes, fork=True)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model.num_hidden_layers": 3}, "model.num_hidden_layers was 2 and is now 3"),
        ({"model.tie_word_embeddings": True}, "model.tie_word_embeddings was False and is now True"),
        ({"numerics.chunk_bytes": 4096}, "numerics.chunk_bytes was 5120 and is now 4096"),
        ({"optimizer.name": "sgd"}, "optimizer.name was 'adamw' and is now 'sgd'"),
    ],
)
def test_a_fork_cannot_change_what_chunks_mean(changes: dict[str, Any], difference: str) -> None:
    manifest = build([full_part("a")])
    with pytest.raises(CheckpointError) as caught:
        check_resume(manifest, CONFIG.with_changes(changes), "data-1", "tokens-1", fork=True)
    assert str(caught.value) == f"cannot resume run r1 at version 8: {difference}; a fork cannot change it"
    check_resume(manifest, CONFIG.with_changes({"optimizer.name": "adam", "model.rope_theta": 5e5}), "x", "y", fork=True)


def test_the_file_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, version=5)
    values = json.loads((folder / MANIFEST).read_text())
    assert list(values)[:4] == ["checksum", "format_version", "run_id", "version"]
    assert values["checksum"] == read_manifest(folder).digest
    assert set(values["chunks"][0]) == {"part", "checksums"}
