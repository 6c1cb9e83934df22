"""Small files that are whole or as they were, also when the disk is full or the process is killed in the midst."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace_file(file: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Durably and atomically; `mode` less the umask. Raises `OSError`, and then leaves nothing beside the file."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, mode)) as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def append_to_file(file: Path, data: bytes) -> None:
    """Durably, and all of it: raises `OSError`, and then the file ends where it did. One process appends at a time."""
    with file.open("ab", buffering=0) as opened:  # a buffer would try again as it is closed
        end = opened.tell()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[opened.write(rest) :]
            os.fsync(opened.fileno())
        except OSError:
            opened.truncate(end)
            raise
