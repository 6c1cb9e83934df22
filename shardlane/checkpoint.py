"""Part files of a checkpoint: safetensors, keys `<chunk id>/<tensor name>`, fp32, one dimension, little-endian.

A part is written as a stream with about one chunk in memory, and has its name only when it is whole and durable, in a folder
as in an object store (`shardlane.storage`). It is read chunk by chunk, each tensor checked against the manifest. The header is
a pure function of the chunks and their sizes, so a reader accepts that one header and no other. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId
from shardlane.manifest import PartReport, cannot_write, damaged, layout_of, read_complete
from shardlane.numerics import fast_digest
from shardlane.partition import BYTES_PER_ELEMENT
from shardlane.storage import Location, Sink, Source, map_ahead, open_sink, open_source

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
    """Writes `part-<owner>.safetensors`. For one thread at a time.

    In a folder chunks may come in any order, each has its place; in an object store they come in their own. Every method raises
    `CheckpointError` when the disk is full or the place not writable, and leaves nothing half-written then.
    """

    def __init__(self, folder: Location, owner: str, sizes: Mapping[ChunkId, int], names: Sequence[str]) -> None:
        """`sizes`: elements of each chunk; `names`: the tensors of each (`shardlane.manifest.tensor_names`)."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", owner):
            raise ValueError(f"{owner!r} cannot be part of a file name")
        self._sizes, self._names = dict(sizes), tuple(names)
        self._index = PartIndex.of(self._sizes, self._names)
        self._file = folder / f"part-{owner}.safetensors"
        self._sink: Sink | None = None
        self._checksums: dict[ChunkId, dict[str, str]] = {}
        with self._writing():
            self._sink = open_sink(self._file, self._index.num_bytes)
            self._sink.write(memoryview(self._index.header), 0)

    def add(self, chunk: ChunkId, tensors: Mapping[str, Tensor]) -> None:
        """Writes a chunk's tensors, each fp32 [size]. They are free to change when this returns."""
        size = self._sizes[chunk]
        if set(tensors) != set(self._names) or chunk in self._checksums:
            raise ValueError(f"chunk {chunk}: expected {self._names} once, found {tuple(tensors)}")
        checksums, sink = {}, self._opened
        with self._writing():
            for name in self._names:
                tensor = tensors[name]
                if tensor.dtype != torch.float32 or tensor.shape != (size,):
                    raise ValueError(f"chunk {chunk}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 ({size},)")
                checksums[name] = checksum(tensor)
                sink.write(raw_bytes(tensor), self._index.offsets[_key(chunk, name)])
        self._checksums[chunk] = checksums

    def finish(self) -> PartReport:
        """Makes the part durable under its own name; every declared chunk must be in."""
        if len(self._checksums) != len(self._sizes):
            raise ValueError(f"{len(self._checksums)} of {len(self._sizes)} chunks are in {self._file}")
        with self._writing():
            self._opened.commit()
        return PartReport(self._file.name, self._index.num_bytes, self._checksums)

    def abort(self) -> None:
        """Removes what was written; a finished part stays. May be called more than once."""
        if self._sink is not None:
            self._sink.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    @property
    def _opened(self) -> Sink:
        assert self._sink is not None
        return self._sink

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise cannot_write(self._file, error) from error


class CheckpointReader:
    """Reads chunks of a complete checkpoint; opens only the parts that it needs. For any thread. Raises `CheckpointError`."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.manifest = read_complete(folder)
        self.layout = layout_of(self.manifest)
        self._num_bytes = {part.file: part.num_bytes for part in self.manifest.parts}
        self._open: dict[str, tuple[Source, PartIndex]] = {}
        self._opening = threading.Lock()

    def read_chunks(self, chunks: Iterable[ChunkId]) -> Iterator[tuple[ChunkId, dict[str, Tensor]]]:
        """Each as by `read_chunk`, in order; from an object store several at a time."""
        read = map if isinstance(self.folder, Path) else map_ahead
        return read(lambda chunk: (chunk, self.read_chunk(chunk)), chunks)

    def read_chunk(self, chunk: ChunkId) -> dict[str, Tensor]:
        """`parameter` and every optimizer state of a chunk, fp32 [size], verified, in memory of their own."""
        return {name: self.read_tensor(chunk, name) for name in self.manifest.tensor_names}

    def read_tensor(self, chunk: ChunkId, name: str) -> Tensor:
        """One tensor of a chunk, fp32 [size], verified, in memory of its own (so aligned)."""
        entry = self.manifest.chunks[chunk]
        file = self.folder / entry.part
        source, index = self._part(entry.part)
        offset = index.offsets.get(_key(chunk, name))
        if offset is None:
            raise damaged(file, f"chunk {chunk} is not in its header")
        tensor = torch.empty(self.layout.chunks[chunk].num_elements, dtype=torch.float32)
        _read(source, raw_bytes(tensor), offset, file)
        if checksum(tensor) != entry.checksums[name]:
            tensor_name = self.layout.tensors[self.layout.chunks[chunk].tensor].name
            raise damaged(file, f"{name} of chunk {chunk} ({tensor_name}) does not match its checksum")
        return tensor

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _part(self, name: str) -> tuple[Source, PartIndex]:
        with self._opening:
            if name not in self._open:
                file = self.folder / name
                try:
                    source = open_source(file)
                except OSError as error:
                    raise _cannot_read(file, error) from error
                try:
                    self._open[name] = source, self._read_index(source, file)
                except CheckpointError:
                    source.close()
                    raise
            return self._open[name]

    def _read_index(self, source: Source, file: Location) -> PartIndex:
        length = bytearray(_LENGTH_BYTES)
        _read(source, memoryview(length), 0, file)
        num_bytes = int.from_bytes(length, "little")
        if num_bytes > self._num_bytes[file.name] - _LENGTH_BYTES:
            raise damaged(file, f"its header claims {num_bytes} bytes")
        text = bytearray(num_bytes)
        _read(source, memoryview(text), _LENGTH_BYTES, file)
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


def _read(source: Source, data: memoryview, offset: int, file: Location) -> None:
    try:
        count = source.read(data, offset)
    except OSError as error:
        raise _cannot_read(file, error) from error
    if count < len(data):
        raise damaged(file, f"it ends at byte {offset + count}")


def _cannot_read(file: Location, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {file}: {error.strerror}")
