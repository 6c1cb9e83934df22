"""Parts are whole or not there, readable by anyone's safetensors, and a damaged byte is named."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardlane.checkpoint import CheckpointReader, PartWriter, checksum
from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId
from shardlane.manifest import MANIFEST, tensor_names
from shardlane.partition import Layout
from tests.shardlane.checkpoints import commit, flip, small_config, state, write_checkpoint, write_part

CONFIG = small_config()
LAYOUT = Layout.of(CONFIG)
NAMES = tensor_names("adamw")
ALL = [chunk.id for chunk in LAYOUT.chunks]


def read_all(folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        for chunk in ALL:
            reader.read_chunk(chunk)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path, optimizer: str) -> None:
    config = small_config(optimizer__name=optimizer)
    folder = write_checkpoint(tmp_path, config, num_parts=3)
    theirs = {key: value for file in folder.glob("part-*") for key, value in load_file(file).items()}
    with CheckpointReader(folder) as reader:
        for chunk in ALL:
            expected = state(config, chunk)
            found = reader.read_chunk(chunk)
            assert list(found) == list(tensor_names(optimizer))
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name])
                assert torch.equal(theirs[f"{chunk}/{name}"], expected[name])
                assert tensor.data_ptr() % 64 == 0  # memory of its own: fused kernels see what they see in training
    assert len(theirs) == len(ALL) * len(tensor_names(optimizer))
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST, *(f"part-shard-{i}.safetensors" for i in range(3))]


def test_the_file_does_not_depend_on_the_order_in_which_chunks_are_added(tmp_path: Path) -> None:
    forth, back = (write_part(tmp_path, owner, CONFIG, chunks) for owner, chunks in (("a", ALL), ("b", ALL[::-1])))
    assert (tmp_path / forth.file).read_bytes() == (tmp_path / back.file).read_bytes()
    assert forth.chunks == back.chunks
    assert forth.num_bytes == (tmp_path / forth.file).stat().st_size
    assert forth.chunks[ChunkId(0)]["exp_avg"] == checksum(state(CONFIG, ChunkId(0))["exp_avg"])


def test_a_part_without_chunks_and_bits_that_arithmetic_would_lose(tmp_path: Path) -> None:
    empty = PartWriter(tmp_path, "empty", {}, NAMES).finish()
    assert load_file(tmp_path / empty.file) == {}
    odd = (
        torch.tensor([0x80000000, 0x7FC12345, 0x00000001, 0xFF800000]).to(torch.uint32).view(torch.float32)
    )  # -0, NaN, denormal, -inf
    with PartWriter(tmp_path, "odd", {ChunkId(0): 4}, ["parameter"]) as writer:
        writer.add(ChunkId(0), {"parameter": odd})
        part = writer.finish()
    assert torch.equal(load_file(tmp_path / part.file)["0/parameter"].view(torch.int32), odd.view(torch.int32))


def test_a_reader_opens_only_the_parts_that_it_needs(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, num_parts=2)
    with CheckpointReader(folder) as reader:
        (folder / "part-shard-1.safetensors").unlink()  # holds the odd chunks
        assert torch.equal(reader.read_tensor(ChunkId(2), "parameter"), state(CONFIG, ChunkId(2))["parameter"])
        with pytest.raises(CheckpointError, match=r"cannot read .*part-shard-1\.safetensors: No such file"):
            reader.read_chunk(ChunkId(1))


def test_a_flipped_byte_anywhere_in_a_part_is_found(tmp_path: Path) -> None:
    config = small_config(model__num_hidden_layers=1, cluster__stages=1)
    folder = write_checkpoint(tmp_path, config, num_parts=1)
    file = folder / "part-shard-0.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    chunks = [chunk.id for chunk in Layout.of(config).chunks]
    for position in [*range(0, header, 7), header - 1, header, *range(header + 1, size, size // 40), size - 1]:
        flip(file, position)
        with CheckpointReader(folder) as reader, pytest.raises(CheckpointError, match=re.escape(f"{file} is damaged: ")):
            [reader.read_chunk(chunk) for chunk in chunks]
        flip(file, position)
    with CheckpointReader(folder) as reader:
        assert len([reader.read_chunk(chunk) for chunk in chunks]) == len(chunks)


def test_the_error_names_file_chunk_and_what_to_do(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, num_parts=1)
    file = folder / "part-shard-0.safetensors"
    flip(file, file.stat().st_size - 1, mask=0x80)
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    assert str(caught.value) == (
        f"{file} is damaged: exp_avg_sq of chunk {ALL[-1]} (lm_head.weight) does not match its checksum;"
        f" restore it from a copy, or remove {folder} to use an older one"
    )


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 4), r"it has \d+ bytes, expected \d+"),
        (lambda file: file.open("ab").write(b"more"), r"it has \d+ bytes, expected \d+"),
        (lambda file: file.unlink(), "it is missing"),
        (lambda file: (file.parent / MANIFEST).unlink(), f"has no {MANIFEST}, so it is no complete checkpoint"),
    ],
    ids=["truncated", "longer", "missing", "torn"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_incomplete_checkpoint_is_not_opened(tmp_path: Path, harm: Callable[[Path], object], reason: str) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    harm(folder / "part-shard-1.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        CheckpointReader(folder)


def test_a_part_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, num_parts=1)
    with CheckpointReader(folder) as reader:
        os.truncate(folder / "part-shard-0.safetensors", 4)
        with pytest.raises(CheckpointError, match="it ends at byte 4"):
            reader.read_chunk(ChunkId(0))


def test_wrong_tensors_are_a_bug_and_nothing_is_left_of_the_part(tmp_path: Path) -> None:
    chunk = ALL[0]
    good = state(CONFIG, chunk)
    sizes = {chunk: len(good["parameter"]), ALL[1]: 4}
    with PartWriter(tmp_path, "w", sizes, NAMES) as writer:
        with pytest.raises(ValueError, match=r"float64"):
            writer.add(chunk, {**good, "exp_avg": good["exp_avg"].double()})
        with pytest.raises(ValueError, match=r"expected float32"):
            writer.add(chunk, {**good, "exp_avg": good["exp_avg"][1:]})
        with pytest.raises(ValueError, match=r"expected \('parameter', 'exp_avg', 'exp_avg_sq'\) once, found"):
            writer.add(chunk, {"parameter": good["parameter"]})
        writer.add(chunk, good)
        with pytest.raises(ValueError, match="once"):
            writer.add(chunk, good)
        with pytest.raises(ValueError, match="1 of 2 chunks are in"):
            writer.finish()
        writer.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="file name"):
        PartWriter(tmp_path, "../w", sizes, NAMES)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_is_named_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError) as caught:
        write_part(tmp_path, "w", CONFIG, ALL)
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'part-w.safetensors'}: No space left on device;"
        " this checkpoint is not taken, free the disk or set checkpoint.path elsewhere"
    )
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued_up_to_a_real_limit_of_the_system(tmp_path: Path, run_python: Callable[[str], str]) -> None:
    out = run_python(f"""
import resource
from pathlib import Path
from shardlane.errors import CheckpointError
from tests.shardlane.checkpoints import deal, small_config, write_part
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a chunk's write is cut short here, the next one fails
try:
    write_part(Path({str(tmp_path)!r}), "w", small_config(), deal(small_config(), 1)[0])
except CheckpointError as error:
    print(error)
""")
    assert "File too large; this checkpoint is not taken" in out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*: (Not a directory|File exists)"):
        PartWriter(tmp_path / "file" / "step-00000001", "w", {}, NAMES)


def test_one_chunk_of_two_copies_lies_where_the_manifest_says(tmp_path: Path) -> None:
    """A shard died after it wrote its part, and the promoted backup wrote the same chunks again."""
    parts = [write_part(tmp_path, "dead", CONFIG, ALL[:5]), write_part(tmp_path, "heir", CONFIG, ALL)]
    manifest = commit(tmp_path, CONFIG, parts)
    assert {entry.part for entry in manifest.chunks[:5]} == {"part-dead.safetensors"}
    read_all(tmp_path)
