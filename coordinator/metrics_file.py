"""metrics.jsonl: a row a step, a row a validation; each step once, whatever was restarted, resumed or rolled back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.core.curve import Curve
from coordinator.core.events import TrainingRow, ValidationRow
from shardlane.files import append_to_file, replace_file
from shardlane.ids import Version

Row = dict[str, Any]


class MetricsFile:
    """`version`: rows of all steps below it are durable. For one thread at a time."""

    def __init__(self, path: Path, version: Version | None = None) -> None:
        """Goes on behind what is there. `version`: rows of later steps and versions are dropped first; None: none are."""
        self._path = path
        self._pending: list[tuple[str, Version]] = []
        self.version = Version(0)
        self.validations: dict[Version, float] = {}
        self.losses, self.validation_losses = Curve(), Curve()  # of what is there, and pending
        if version is not None:
            self.drop_after(version)
        else:
            self._rewrite(lambda row: True)

    @property
    def num_pending(self) -> int:
        """Rows that are not durable yet."""
        return len(self._pending)

    def append(self, row: TrainingRow | ValidationRow) -> None:
        """Takes a row for the next `flush`."""
        after = row.summary.step + 1 if isinstance(row, TrainingRow) else 0
        values = values_of(row)
        self._pending.append((json.dumps(values, allow_nan=False) + "\n", Version(after)))
        self._draw(values)

    def flush(self) -> None:
        """Makes pending rows durable, or raises `OSError`, keeps them, and leaves no half of them behind."""
        if not self._pending:
            return
        append_to_file(self._path, "".join(line for line, _ in self._pending).encode())
        self.version = max(self.version, *(after for _, after in self._pending))
        self._pending.clear()

    def drop_after(self, version: Version) -> None:
        """Forgets steps from `version` on and validations of later versions, pending ones too. Raises `OSError`: try again."""
        self._pending.clear()
        self.version = version
        self._rewrite(lambda row: row["step"] <= version if "val_loss" in row else row["step"] < version)
        self.version = version

    def _rewrite(self, keep: Callable[[Row], bool]) -> None:
        """Atomically. A torn last line, of a crash, goes too."""
        self.validations = {}
        self.losses.clear()
        self.validation_losses.clear()
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        kept = [line for line in lines if (row := _parse(line)) is not None and keep(row) and self._note(row)]
        if kept != lines:
            replace_file(self._path, b"".join(kept))

    def _draw(self, row: Row) -> None:
        curve, loss = (self.validation_losses, row["val_loss"]) if "val_loss" in row else (self.losses, row.get("loss"))
        if isinstance(loss, float):  # None: it was not finite
            curve.add(row["step"], loss)

    def _note(self, row: Row) -> bool:
        self._draw(row)
        if "val_loss" in row:
            self.validations[Version(row["step"])] = math.nan if row["val_loss"] is None else row["val_loss"]
        else:
            self.version = max(self.version, Version(row["step"] + 1))
        return True


def values_of(row: TrainingRow | ValidationRow) -> Row:
    """What there is to read of a row; None where a number is not finite, for JSON has no infinity and no NaN."""
    match row:
        case TrainingRow(summary, tokens_per_second):
            return {
                "step": summary.step,
                "loss": _json(summary.loss),
                "grad_norm": _json(summary.grad_norm),
                "lr": summary.learning_rate,
                "tokens": summary.tokens,
                "tokens_per_second": round(tokens_per_second, 3),
                **({"skipped": True} if summary.skipped else {}),
                **({"refused": True} if summary.refused else {}),
            }
        case ValidationRow(version, loss):
            return {"step": version, "val_loss": _json(loss)}


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        return row if line.endswith(b"\n") and isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
