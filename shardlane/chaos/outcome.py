"""What one fault cost, from when things were seen. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

STEPS_LOOKED_AT = 3
"""Versions after a signal within which the pause must lie: the one known at the signal may be a poll old, the open step may
end without its victim, and the one after that cannot."""


@dataclass
class Outcome:
    """Seconds count from the signal. None: it was not seen."""

    group: str
    kind: str
    victims: list[str]
    step_seconds: float  # an ordinary step, just before
    rolls_back: bool = False  # expected of this fault
    detection_seconds: float | None = None  # until another plan; none comes for a coordinator
    recovery_seconds: float | None = None  # see `recovery`
    whole_seconds: float | None = None  # until every process has its place and every chunk its copies
    steps_rolled_back: int = 0
    later_pause_seconds: float = 0.0  # the longest after recovery, until the cluster was whole, less a step: others coming back
    notes: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.recovery_seconds is not None and self.whole_seconds is not None

    def as_json(self) -> dict[str, Any]:
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def recovery(signalled: float, published: Sequence[float], *, step_seconds: float, detected: float | None = None) -> float:
    """Seconds that training stood still beyond an ordinary step.

    `published`: when each of the versions after the signal appeared. The longest wait counts, from the signal or the version
    before; what came before `detected`, if it is given, does not.
    """
    started, ended = max(pairwise([signalled, *published]), key=lambda span: span[1] - span[0])
    if detected is not None and detected < ended:
        started = max(started, detected)
    return max(0.0, ended - started - step_seconds)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed (nearest rank). Raises `ValueError` without any."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
