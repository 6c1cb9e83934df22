"""Pipeline schedules as lists of actions, one list a stage.

GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B: PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503. Zero bubble: the idea
of ZB-H1, Qi et al. 2023, arXiv:2401.10241. All of them split a backward pass: the gradient of the input goes to the stage before
at once, the weights' gradients are an action of their own. With all three actions of one length, a step of GPipe or 1F1B takes
3 M + 2 (P - 1) of them, one of zero bubble 3 M + P - 1.

Passes come in index order in every schedule, so a lane's micro-batches add up in the same order whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardlane.ids import MicroBatch

ScheduleName = Literal["1f1b", "gpipe", "zero_bubble"]


@dataclass(frozen=True, slots=True)
class Forward:
    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Backward:
    """The gradient of the input, which the stage before waits for."""

    micro_batch: MicroBatch


@dataclass(frozen=True, slots=True)
class Weights:
    """The gradients of the weights, which no stage waits for. Until then the micro-batch is in flight."""

    micro_batch: MicroBatch


Action = Forward | Backward | Weights


def schedule(name: ScheduleName, stage: int, num_stages: int, micro_batches: Sequence[MicroBatch]) -> list[Action]:
    """The actions of `stage` for the micro-batches of a step, in their order.

    In flight are at most: in GPipe all micro-batches, in 1F1B `num_stages - stage`, in zero bubble `num_stages + 1`.
    """
    if name == "zero_bubble":
        return _zero_bubble(stage, num_stages, micro_batches)
    count = len(micro_batches)
    ahead = count if name == "gpipe" else min(count, num_stages - stage - 1)
    actions: list[Action] = [Forward(each) for each in micro_batches[:ahead]]
    for index in range(count):
        if ahead + index < count:
            actions.append(Forward(micro_batches[ahead + index]))
        actions += [Backward(micro_batches[index]), Weights(micro_batches[index])]
    return actions


def _zero_bubble(stage: int, num_stages: int, micro_batches: Sequence[MicroBatch]) -> list[Action]:
    """Plays all stages with actions of one tick each: whoever is free does what others wait for first, and weights otherwise."""
    count, last = len(micro_batches), num_stages - 1
    forwards, backwards, weights = ([0] * num_stages for _ in range(3))  # done, by stage
    actions: list[Action] = []
    while weights[stage] < count:
        arrived, returned = list(forwards), list(backwards)  # as of the tick before
        for each in range(num_stages):
            action: Action | None = None
            if (done := backwards[each]) < arrived[each] and (each == last or returned[each + 1] > done):
                action, backwards[each] = Backward(micro_batches[done]), done + 1
            elif (
                (done := forwards[each]) < count
                and (each == 0 or arrived[each - 1] > done)
                and done - weights[each] <= num_stages  # one more than a round trip through the pipeline: slack for uneven stages
            ):
                action, forwards[each] = Forward(micro_batches[done]), done + 1
            elif (done := weights[each]) < backwards[each]:
                action, weights[each] = Weights(micro_batches[done]), done + 1
            if each == stage and action is not None:
                actions.append(action)
    return actions
