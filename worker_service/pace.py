"""How fast this worker computes, for the coordinator to share the lanes by."""

from __future__ import annotations

_RUNS_MIN = 3  # the first ones in a seat touch new memory
_NEWS = 0.2  # weight of the newest run


class Pace:
    """Of one seat."""

    def __init__(self) -> None:
        self._num_runs = 0
        self._mean_seconds = 0.0

    @property
    def lane_seconds(self) -> float:
        """Of computing for one lane of a step, without waiting for others; 0 while it is not known."""
        return self._mean_seconds if self._num_runs >= _RUNS_MIN else 0.0

    def add(self, seconds: float, num_lanes: int) -> None:
        """One run over so many lanes."""
        self._num_runs += 1
        news = 1.0 if self._num_runs <= _RUNS_MIN else _NEWS
        self._mean_seconds += news * (seconds / num_lanes - self._mean_seconds)
