"""Pipeline schedules as lists of actions, one list a stage.

GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B: PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503. Both idle for P - 1
forward and backward times of M + P - 1.

Backward passes come in index order in every schedule, so a lane's micro-batches add up in the same order whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardlane.ids import MicroBatch

ScheduleName = Literal["1f1b", "gpipe"]


@dataclass(frozen=True, slots=True)
class Forward:
    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Backward:
    micro_batch: MicroBatch


Action = Forward | Backward


def schedule(name: ScheduleName, stage: int, num_stages: int, micro_batches: Sequence[MicroBatch]) -> list[Action]:
    """The actions of `stage` for the micro-batches of a step, in their order.

    1F1B keeps at most `num_stages - stage` micro-batches in flight; GPipe all of them.
    """
    count = len(micro_batches)
    ahead = count if name == "gpipe" else min(count, num_stages - stage - 1)
    actions: list[Action] = [Forward(each) for each in micro_batches[:ahead]]
    for index in range(count):
        if ahead + index < count:
            actions.append(Forward(micro_batches[ahead + index]))
        actions.append(Backward(micro_batches[index]))
    return actions
