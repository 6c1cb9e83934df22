"""Token folders that lie in an object store: fetched once a machine, checked byte by byte, and then a local folder as any other.

Training reads a window here and a window there in every step, and checks the whole of its data before it begins: a copy on the
machine's disk does both, and an outage of the store holds up no step. It has the name of the data's digest, so runs share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardlane.config import Config
from shardlane.data import INDEX_FILE, TOKENIZER_FILE, Index, TokenFolder, file_sizes, open_token_folder, parse_index
from shardlane.errors import DataError
from shardlane.objects import ObjectPath
from shardlane.storage import Location, locate, map_ahead, open_sink, write_whole

BLOCK_BYTES = 8 << 20  # of a file on its way
TOKENIZER_BYTES_MAX = 1 << 30


def open_tokens(config: Config) -> TokenFolder:
    """The data of `data.path`, fetched first if they lie in an object store and are not here yet. Raises `DataError`."""
    place = locate(config.data.path)
    if isinstance(place, Path):
        return open_token_folder(place, model_vocab_size=config.model.vocab_size)
    folder, is_new = _fetch(place, cache_folder(config))
    return open_token_folder(folder, model_vocab_size=config.model.vocab_size, verify=not is_new)


def tokenizer_at(place: Location, config: Config) -> Path | None:
    """The tokenizer of the data at `place`, without the tokens; None if it is not there. Raises `DataError`."""
    if isinstance(place, Path):
        file = place / TOKENIZER_FILE
        return file if file.is_file() else None
    expected = _read_index(place).tokenizer_sha256
    folder = cache_folder(config) / "tokenizers"
    file = folder / f"{expected}.json"
    if not file.is_file():
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _download(place / TOKENIZER_FILE, file, None, expected)
    return file


def put_tokens(folder: TokenFolder, place: ObjectPath) -> bool:
    """Copies a folder to an object store, its index last. False: another process was first, and its index stays.

    Two processes that prepare different data for one place at once spoil them; whoever reads these finds that out.
    """
    try:
        for name in (*file_sizes(folder.index), TOKENIZER_FILE):
            _upload(folder.path / name, place / name)
        write_whole(place / INDEX_FILE, (folder.path / INDEX_FILE).read_bytes())
    except FileExistsError:
        return False
    except OSError as error:
        raise DataError(f"cannot write the token files {place}: {error.strerror}") from error
    return True


def cache_folder(config: Config) -> Path:
    """Raises `DataError`."""
    try:
        return Path(config.data.cache).expanduser() if config.data.cache else Path.home() / ".cache" / "shardlane"
    except RuntimeError as error:
        raise DataError("there is no home folder to keep the data of a URI in; set data.cache to a folder") from error


def _fetch(place: ObjectPath, cache: Path) -> tuple[Path, bool]:
    """The local copy, and whether it was made, and checked, only now."""
    index = _read_index(place)
    digest = index.digest()
    folder = cache / digest
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{digest}.lock"):  # several workers of a machine want the same
            if folder.is_dir():
                return folder, False
            building = cache / f".{digest}.{secrets.token_hex(8)}"
            try:
                building.mkdir()
                for name, (num_bytes, sha256) in file_sizes(index).items():
                    _download(place / name, building / name, num_bytes, sha256)
                _download(place / TOKENIZER_FILE, building / TOKENIZER_FILE, None, index.tokenizer_sha256)
                (building / INDEX_FILE).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return folder, True


def _read_index(place: ObjectPath) -> Index:
    file = place / INDEX_FILE
    try:
        return parse_index(file.read_bytes(), file)
    except FileNotFoundError as error:
        raise DataError(
            f"there is no token folder {place}; run `shardlane prepare --out {place}`, or set data.path to a prepared one"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _download(source: ObjectPath, target: Path, num_bytes: int | None, sha256: str) -> None:
    """Whole or not at all. None: any size within reason. Raises `DataError` for other bytes than those that were meant."""
    try:
        found = source.num_bytes()
        if found > TOKENIZER_BYTES_MAX if num_bytes is None else found != num_bytes:
            raise DataError(f"{source} has {found} bytes, {INDEX_FILE} says {num_bytes or f'{TOKENIZER_BYTES_MAX} at most'}")
        digest, offset = hashlib.sha256(), 0
        sink = open_sink(target, found)
        try:
            for block in map_ahead(lambda start: source.read_range(start, BLOCK_BYTES), range(0, found, BLOCK_BYTES)):
                digest.update(block)
                sink.write(block, offset)
                offset += len(block)
            if digest.hexdigest() != sha256:
                raise DataError(
                    f"{source} is damaged: its SHA-256 is {digest.hexdigest()[:12]}…, {INDEX_FILE} says {sha256[:12]}…;"
                    " put it back from a copy, or remove them all and run `shardlane prepare` again"
                )
            sink.commit()
        finally:
            sink.abort()
    except FileNotFoundError as error:
        raise DataError(
            f"{source} is missing, so {source.parent} is not a whole token folder; put it back from a copy"
        ) from error
    except OSError as error:
        raise DataError(f"cannot copy {source} to {target}: {error.strerror}") from error


def _upload(source: Path, target: ObjectPath) -> None:
    with source.open("rb") as file:
        sink = open_sink(target, os.fstat(file.fileno()).st_size)
        try:
            offset = 0
            while block := file.read(BLOCK_BYTES):
                sink.write(memoryview(block), offset)
                offset += len(block)
            sink.commit()
        finally:
            sink.abort()


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot keep data in {cache}: {error.strerror}; free the disk, or set data.cache to a folder") from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """The system lets go when the process dies."""
    with file.open("wb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
