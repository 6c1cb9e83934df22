"""A loss over a whole run in bounded memory: neighbours are joined to their mean when there are too many points."""

from __future__ import annotations

import math

POINTS_MAX = 512


class Curve:
    """Of values by step, ascending; those that are not finite are left out. A step that comes again is added to its mean."""

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        """`points_max`: even."""
        self._points_max = points_max
        self._stride = 1  # steps that one point stands for: a power of two
        self._parts: dict[int, tuple[float, int, int]] = {}  # by step // stride: sum, count, last step

    def add(self, step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        self._join(step // self._stride, value, 1, step)
        while len(self._parts) > self._points_max:
            self._stride *= 2
            parts, self._parts = self._parts, {}
            for index, (total, count, last) in parts.items():
                self._join(index // 2, total, count, last)

    def clear(self) -> None:
        self._stride, self._parts = 1, {}

    def points(self, most: int = POINTS_MAX) -> list[tuple[int, float]]:
        """(last step, mean) of at most `most` parts of the run, at least 1; the oldest first."""
        kept = list(self._parts.values())
        size = max(1, -(-len(kept) // most))
        groups = [kept[first : first + size] for first in range(0, len(kept), size)]
        return [(group[-1][2], sum(each[0] for each in group) / sum(each[1] for each in group)) for group in groups]

    def _join(self, index: int, total: float, count: int, last: int) -> None:
        other_total, other_count, other_last = self._parts.get(index, (0.0, 0, 0))
        self._parts[index] = (other_total + total, other_count + count, max(other_last, last))
