"""What checkpoints and data need of the place where they lie: a folder, or a prefix in an object store (`shardlane.objects`).

A local file is written under another name, synced and renamed. An object is there, whole, when its last byte is, so it needs
neither. Everything here raises `OSError`.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from shardlane.errors import UserError
from shardlane.objects import ObjectPath, open_store
from shardlane.uris import ObjectUri, parse_place

Location = Path | ObjectPath

READS_AHEAD = 8  # of an object store: one read at a time would wait for the network most of the time
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Source(Protocol):
    """A file that is read anywhere, by any thread."""

    def read(self, data: memoryview, offset: int) -> int:
        """Fills `data` from `offset` on; fewer bytes than it holds where the file ends."""

    def close(self) -> None: ...


class Sink(Protocol):
    """A file under way; it has its name, whole and durable, when `commit` returns, and never before."""

    def write(self, data: memoryview, offset: int) -> None: ...

    def commit(self) -> None: ...

    def abort(self) -> None:
        """Takes back what is not committed. May be called more than once."""


def locate(place: str) -> Location:
    """Of a config's path or URI. Raises `UserError`."""
    try:
        parsed = parse_place(place)
    except ValueError as error:
        raise UserError(str(error)) from error
    return open_store(parsed) if isinstance(parsed, ObjectUri) else Path(parsed).expanduser().absolute()


def open_source(file: Location) -> Source:
    return _LocalSource(file) if isinstance(file, Path) else _ObjectSource(file)


def open_sink(file: Location, num_bytes: int) -> Sink:
    """Makes the folder if it is missing. An object is written from its beginning to its end, a local file anywhere."""
    return _LocalSink(file) if isinstance(file, Path) else file.upload(num_bytes)


def write_whole(file: Location, data: bytes) -> None:
    """Durably and atomically. A local file is replaced; where there is such an object it is left, with a `FileExistsError`."""
    if not isinstance(file, Path):
        file.create(data)
        return
    sink = _LocalSink(file)
    try:
        sink.write(memoryview(data), 0)
        sink.commit()
        sync_folder(file.parent.parent)
    except OSError:
        sink.abort()
        raise


def file_size(file: Location) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.num_bytes()


def folders_in(root: Location) -> list[Location]:
    """None where there is no such folder."""
    if not isinstance(root, Path):
        return list(root.folders())
    try:
        return [folder for folder in root.iterdir() if folder.is_dir()]
    except FileNotFoundError:
        return []


def remove_folder(folder: Location, *, first: str) -> None:
    """The file `first` before all others: a removal that is cut short leaves a folder without it."""
    if isinstance(folder, Path):
        (folder / first).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)
    else:
        (folder / first).remove()
        folder.remove_all()


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def map_ahead(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """As `map`, in order, with `READS_AHEAD` calls under way at a time."""
    pool = ThreadPoolExecutor(READS_AHEAD, thread_name_prefix="read-ahead")
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == READS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _LocalSource:
    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, data: memoryview, offset: int) -> int:
        filled = 0
        while filled < len(data) and (count := os.preadv(self._descriptor, [data[filled:]], offset + filled)):
            filled += count
        return filled

    def close(self) -> None:
        os.close(self._descriptor)


class _ObjectSource:
    def __init__(self, file: ObjectPath) -> None:
        self._file = file

    def read(self, data: memoryview, offset: int) -> int:
        if not data:
            return 0
        found = self._file.read_range(offset, len(data))[: len(data)]
        data[: len(found)] = found
        return len(found)

    def close(self) -> None:
        pass


class _LocalSink:
    def __init__(self, file: Path) -> None:
        self._file, self._temporary = file, file.with_name(f"{file.name}.tmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def commit(self) -> None:
        os.fsync(self._descriptor)
        self._close()
        self._temporary.replace(self._file)
        sync_folder(self._file.parent)

    def abort(self) -> None:
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._temporary.unlink()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
