"""Part files of a checkpoint: safetensors, keys `<chunk id>/<tensor name>`, fp32, one dimension, little-endian.

A part is written as a stream with about one chunk in memory, under a temporary name, and has its own name only when it is
whole and durable. It is read chunk by chunk, each tensor checked against the manifest. The header is a pure function of
the chunks and their sizes, so a reader accepts that one header and no other. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId
from shardlane.manifest import PartReport, cannot_write, damaged, layout_of, read_complete, sync_folder
from shardlane.numerics import fast_digest
from shardlane.partition import BYTES_PER_ELEMENT

DATA_ALIGNMENT_BYTES = 64
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class PartIndex:
    """Where everything lies in a part: chunks by id, in each the tensors in their order, without gaps."""

    header: bytes
    offsets: Mapping[str, int]  # bytes from the file's beginning, by key
    num_bytes: int

    @classmethod
    def of(cls, sizes: Mapping[ChunkId, int], names: Sequence[str]) -> PartIndex:
        """`sizes`: elements of each chunk, all of whose tensors (`names`) have that size."""
        entries, begins, end = {}, {}, 0
        for chunk in sorted(sizes):
            for name in names:
                key, begin, end = _key(chunk, name), end, end + sizes[chunk] * BYTES_PER_ELEMENT
                entries[key] = {"dtype": "F32", "shape": [sizes[chunk]], "data_offsets": [begin, end]}
                begins[key] = begin
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH_BYTES + len(text)) % DATA_ALIGNMENT_BYTES)
        header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        return cls(header, {key: len(header) + begin for key, begin in begins.items()}, len(header) + end)


class PartWriter:
    """Writes `part-<owner>.safetensors`. Chunks may come in any order; each has its place. For one thread at a time.

    Every method raises `CheckpointError` when the disk is full or not writable, and leaves no temporary file then.
    """

    def __init__(self, folder: Path, owner: str, sizes: Mapping[ChunkId, int], names: Sequence[str]) -> None:
        """`sizes`: elements of each chunk; `names`: the tensors of each (`shardlane.manifest.tensor_names`)."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", owner):
            raise ValueError(f"{owner!r} cannot be part of a file name")
        self._sizes, self._names = dict(sizes), tuple(names)
        self._index = PartIndex.of(self._sizes, self._names)
        self._file = folder / f"part-{owner}.safetensors"
        self._temporary = folder / f"{self._file.name}.tmp"
        self._descriptor = -1
        self._checksums: dict[ChunkId, dict[str, str]] = {}
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            self._write(memoryview(self._index.header), 0)

    def add(self, chunk: ChunkId, tensors: Mapping[str, Tensor]) -> None:
        """Writes a chunk's tensors, each fp32 [size]. They are free to change when this returns."""
        size = self._sizes[chunk]
        if set(tensors) != set(self._names) or chunk in self._checksums:
            raise ValueError(f"chunk {chunk}: expected {self._names} once, found {tuple(tensors)}")
        checksums = {}
        with self._writing():
            for name in self._names:
                tensor = tensors[name]
                if tensor.dtype != torch.float32 or tensor.shape != (size,):
                    raise ValueError(f"chunk {chunk}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 ({size},)")
                checksums[name] = checksum(tensor)
                self._write(raw_bytes(tensor), self._index.offsets[_key(chunk, name)])
        self._checksums[chunk] = checksums

    def finish(self) -> PartReport:
        """Makes the part durable under its own name; every declared chunk must be in."""
        if len(self._checksums) != len(self._sizes):
            raise ValueError(f"{len(self._checksums)} of {len(self._sizes)} chunks are in {self._temporary}")
        with self._writing():
            os.fsync(self._descriptor)
            self._close()
            self._temporary.replace(self._file)
            sync_folder(self._file.parent)
        return PartReport(self._file.name, self._index.num_bytes, self._checksums)

    def abort(self) -> None:
        """Removes what was written; a finished part stays. May be called more than once."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._temporary.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise cannot_write(self._file, error) from error


class CheckpointReader:
    """Reads chunks of a complete checkpoint; opens only the parts that it needs. Raises `CheckpointError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_complete(folder)
        self.layout = layout_of(self.manifest)
        self._num_bytes = {part.file: part.num_bytes for part in self.manifest.parts}
        self._open: dict[str, tuple[int, PartIndex]] = {}

    def read_chunk(self, chunk: ChunkId) -> dict[str, Tensor]:
        """`parameter` and every optimizer state of a chunk, fp32 [size], verified, in memory of their own."""
        return {name: self.read_tensor(chunk, name) for name in self.manifest.tensor_names}

    def read_tensor(self, chunk: ChunkId, name: str) -> Tensor:
        """One tensor of a chunk, fp32 [size], verified, in memory of its own (so aligned)."""
        entry = self.manifest.chunks[chunk]
        file = self.folder / entry.part
        descriptor, index = self._part(entry.part)
        offset = index.offsets.get(_key(chunk, name))
        if offset is None:
            raise damaged(file, f"chunk {chunk} is not in its header")
        tensor = torch.empty(self.layout.chunks[chunk].num_elements, dtype=torch.float32)
        _read(descriptor, raw_bytes(tensor), offset, file)
        if checksum(tensor) != entry.checksums[name]:
            tensor_name = self.layout.tensors[self.layout.chunks[chunk].tensor].name
            raise damaged(file, f"{name} of chunk {chunk} ({tensor_name}) does not match its checksum")
        return tensor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _part(self, name: str) -> tuple[int, PartIndex]:
        if name not in self._open:
            file = self.folder / name
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
            try:
                self._open[name] = descriptor, self._read_index(descriptor, file)
            except CheckpointError:
                os.close(descriptor)
                raise
        return self._open[name]

    def _read_index(self, descriptor: int, file: Path) -> PartIndex:
        length = bytearray(_LENGTH_BYTES)
        _read(descriptor, memoryview(length), 0, file)
        num_bytes = int.from_bytes(length, "little")
        if num_bytes > self._num_bytes[file.name] - _LENGTH_BYTES:
            raise damaged(file, f"its header claims {num_bytes} bytes")
        text = bytearray(num_bytes)
        _read(descriptor, memoryview(text), _LENGTH_BYTES, file)
        try:
            chunks = {ChunkId(int(key.partition("/")[0])) for key in json.loads(text)}
            sizes = {chunk: self.layout.chunks[chunk].num_elements for chunk in chunks}
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise damaged(file, "its header cannot be read") from error
        index = PartIndex.of(sizes, self.manifest.tensor_names)
        if index.header != length + text or index.num_bytes != self._num_bytes[file.name]:
            raise damaged(file, "its header is not the one that its chunks have")
        return index


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, as a view where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> str:
    """xxh3_64 of a tensor's bytes, in hex."""
    return f"{fast_digest(tensor):016x}"


def _key(chunk: ChunkId, name: str) -> str:
    return f"{chunk}/{name}"


def _read(descriptor: int, data: memoryview, offset: int, file: Path) -> None:
    while data:
        try:
            count = os.preadv(descriptor, [data], offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        if count == 0:
            raise damaged(file, f"it ends at byte {offset}")
        data, offset = data[count:], offset + count
