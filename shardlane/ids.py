"""Typed names for the numbers that travel between services, and the few values built of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Step = NewType("Step", int)  # one optimizer update of the whole model, from 0
Version = NewType("Version", int)  # the parameters after that many steps; 0 is the initial ones
Lane = NewType("Lane", int)  # a logical data-parallel rank, 0 … L-1
MicroBatch = NewType("MicroBatch", int)  # index m of a micro-batch within its step, 0 … M-1
ChunkId = NewType("ChunkId", int)  # index of a chunk in the config's fixed order
SiteIndex = NewType("SiteIndex", int)  # which use of a tensor: 0, or 1 for the second use of a tied tensor
Incarnation = NewType("Incarnation", str)  # one life of a process, e.g. "worker-3f9a0c1e"
RunId = NewType("RunId", str)

PROTOCOL_VERSION = 5
"""Raised by every change that an older peer would misread; registration refuses any other by name."""


@dataclass(frozen=True, order=True, slots=True)
class PlanNumber:
    """Orders plans: the coordinator's term first, then the membership epoch within it."""

    term: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.term}.{self.epoch}"


@dataclass(frozen=True, slots=True)
class Timeline:
    """The history since the last roll-back: an id and the checkpoint that it began with.

    `version` is the version of that checkpoint and `digest` its manifest's digest ("" when the timeline began with the
    initial parameters). `clocks`: of each lane, under ASP, the batches that it had learnt from by then; empty: none.
    """

    id: int
    version: Version
    digest: str = ""
    clocks: tuple[int, ...] = ()
