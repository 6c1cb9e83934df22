"""metrics.jsonl as the command line uses it: followed while a coordinator writes it, written by `reference`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardlane.errors import UserError
from shardlane.files import append_to_file, replace_file

Row = dict[str, Any]


def format_row(row: Row) -> str:
    """`step: 10  loss: 3.1000  grad_norm: 0.9000  lr: 3.00e-03  tps: 12,345`, or of a validation `step: 10  val_loss: 3.1000`."""
    if "val_loss" in row:
        return f"step: {row['step']}  val_loss: {_number(row['val_loss'])}"
    parts = [f"step: {row['step']}", f"loss: {_number(row['loss'])}", f"grad_norm: {_number(row['grad_norm'])}"]
    parts += [f"lr: {row['lr']:.2e}", f"tps: {row['tokens_per_second']:,.0f}"]
    reasons = {"skipped": "skipped: gradients not finite", "refused": "refused: computed from too old a version"}
    return "  ".join([*parts, *(reason for name, reason in reasons.items() if row.get(name))])


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


class RowsTail:
    """Rows as they are added; a file that was rewritten, as after a roll-back, is read again and known lines passed over."""

    def __init__(self, file: Path, *, skip_present: bool = True) -> None:
        self._file = file
        self._known: set[int] = set()  # hashes of lines
        self._inode = 0
        self._offset = 0
        if skip_present:
            self.read()

    def read(self) -> list[Row]:
        """Whole lines that came since the last call."""
        try:
            with self._file.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = []
        for line in whole.splitlines():
            if hash(line) not in self._known:
                self._known.add(hash(line))
                rows.append(json.loads(line))
        return rows


class RowsFile:
    """Appends rows; begins by dropping those of steps that are about to be trained again."""

    def __init__(self, file: Path, version: int) -> None:
        """Raises `UserError`."""
        self._path = file
        rows = RowsTail(file, skip_present=False).read()  # without a torn last line, of a crash
        kept = [row for row in rows if (row["step"] <= version if "val_loss" in row else row["step"] < version)]
        data = "".join(map(_line, kept)).encode()
        with self._writing():
            if data != (file.read_bytes() if file.exists() else b""):
                replace_file(file, data)

    def append(self, row: Row) -> None:
        """Durable when this returns. Raises `UserError`, and then the file is as it was."""
        with self._writing():
            append_to_file(self._path, _line(row).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; free the disk, and start the run again") from error


def _line(row: Row) -> str:
    """JSON has no infinity and no NaN: they become null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
