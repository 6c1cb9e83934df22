"""Schedules as lists: what depends on what, how much is in flight, how long the pipeline idles."""

from __future__ import annotations

import pytest

from shardlane.ids import MicroBatch
from worker_service.core.schedule import Action, Backward, Forward, ScheduleName, schedule

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 8), (3, 2), (4, 4), (4, 16), (5, 3)]
NAMES: list[ScheduleName] = ["1f1b", "gpipe"]


def lists(name: ScheduleName, num_stages: int, count: int) -> list[list[Action]]:
    micro_batches = [MicroBatch(10 + each) for each in range(count)]  # not from 0: a replica's lanes may begin anywhere
    return [schedule(name, stage, num_stages, micro_batches) for stage in range(num_stages)]


def play(stages: list[list[Action]]) -> int:
    """Runs the lists with forward and backward of one tick each, no action before what it needs; ticks until all are done."""
    done: dict[tuple[int, Action], int] = {}
    at, tick = [0] * len(stages), 0
    while any(at[stage] < len(actions) for stage, actions in enumerate(stages)):
        assert tick < 4 * sum(map(len, stages)) + 4, "the stages wait for one another"
        for stage, actions in enumerate(stages):
            if at[stage] == len(actions):
                continue
            action = actions[at[stage]]
            needs: list[tuple[int, Action]] = []
            if isinstance(action, Forward) and stage:
                needs.append((stage - 1, action))
            if isinstance(action, Backward):
                needs.append((stage, Forward(action.micro_batch)))
                if stage + 1 < len(stages):
                    needs.append((stage + 1, action))
            if all(done.get(need, tick) < tick for need in needs):
                done[stage, action] = tick
                at[stage] += 1
        tick += 1
    return tick


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_stages", "count"), SHAPES)
def test_every_micro_batch_goes_forward_then_backward_in_index_order(name: ScheduleName, num_stages: int, count: int) -> None:
    expected = [MicroBatch(10 + each) for each in range(count)]
    for actions in lists(name, num_stages, count):
        assert [each.micro_batch for each in actions if isinstance(each, Forward)] == expected
        assert [each.micro_batch for each in actions if isinstance(each, Backward)] == expected
        assert all(actions.index(Forward(each)) < actions.index(Backward(each)) for each in expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_stages", "count"), SHAPES)
def test_the_bubble_is_that_of_the_papers(name: ScheduleName, num_stages: int, count: int) -> None:
    """Each stage works 2 M ticks of the 2 (M + P - 1) that a step takes: it idles for 2 (P - 1)."""
    assert play(lists(name, num_stages, count)) == 2 * (count + num_stages - 1)


@pytest.mark.parametrize(("num_stages", "count"), SHAPES)
def test_in_flight(num_stages: int, count: int) -> None:
    def most_in_flight(actions: list[Action]) -> int:
        held = [0]
        for action in actions:
            held.append(held[-1] + (1 if isinstance(action, Forward) else -1))
        return max(held)

    for stage, actions in enumerate(lists("1f1b", num_stages, count)):
        assert most_in_flight(actions) == min(num_stages - stage, count)
    for actions in lists("gpipe", num_stages, count):
        assert most_in_flight(actions) == count


def test_1f1b_spelled_out() -> None:
    f0, f1, f2, b0, b1, b2 = *(Forward(MicroBatch(each)) for each in range(3)), *(Backward(MicroBatch(each)) for each in range(3))
    assert schedule("1f1b", 0, 2, [MicroBatch(each) for each in range(3)]) == [f0, f1, b0, f2, b1, b2]
    assert schedule("1f1b", 1, 2, [MicroBatch(each) for each in range(3)]) == [f0, b0, f1, b1, f2, b2]
