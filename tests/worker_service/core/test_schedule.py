"""Schedules as lists: what depends on what, how much is in flight, how long the pipeline idles."""

from __future__ import annotations

import pytest

from shardlane.ids import MicroBatch
from worker_service.core.schedule import Action, Backward, Forward, ScheduleName, Weights, schedule

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 8), (3, 2), (4, 4), (4, 16), (5, 3)]
NAMES: list[ScheduleName] = ["1f1b", "gpipe", "zero_bubble"]


def lists(name: ScheduleName, num_stages: int, count: int) -> list[list[Action]]:
    micro_batches = [MicroBatch(10 + each) for each in range(count)]  # not from 0: a replica's lanes may begin anywhere
    return [schedule(name, stage, num_stages, micro_batches) for stage in range(num_stages)]


def play(stages: list[list[Action]]) -> int:
    """Runs the lists with actions of one tick each, no action before what it needs; ticks until all are done."""
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
            if isinstance(action, Weights):
                needs.append((stage, Backward(action.micro_batch)))
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
        assert [each.micro_batch for each in actions if isinstance(each, Weights)] == expected
        assert len(actions) == 3 * count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_stages", "count"), SHAPES)
def test_the_bubble_is_that_of_the_papers(name: ScheduleName, num_stages: int, count: int) -> None:
    """Each stage works 3 M ticks. The last one waits for P - 1 forwards; the first, but in zero bubble, for as many backwards."""
    idle = num_stages - 1
    if name != "zero_bubble" or count < num_stages:
        idle *= 2
    ticks = play(lists(name, num_stages, count))
    assert ticks <= 3 * count + idle if name == "zero_bubble" else ticks == 3 * count + idle


@pytest.mark.parametrize(("num_stages", "count"), SHAPES)
def test_in_flight(num_stages: int, count: int) -> None:
    def most_in_flight(actions: list[Action]) -> int:
        held = [0]
        for action in actions:
            held.append(held[-1] + {Forward: 1, Backward: 0, Weights: -1}[type(action)])
        return max(held)

    for stage, actions in enumerate(lists("1f1b", num_stages, count)):
        assert most_in_flight(actions) == min(num_stages - stage, count)
    for actions in lists("gpipe", num_stages, count):
        assert most_in_flight(actions) == count
    for actions in lists("zero_bubble", num_stages, count):
        assert most_in_flight(actions) <= min(num_stages + 1, count)


def spelled(name: ScheduleName, stage: int) -> str:
    """Of 2 stages and 4 micro-batches."""
    actions = schedule(name, stage, 2, [MicroBatch(each) for each in range(4)])
    return " ".join(f"{type(each).__name__[0]}{each.micro_batch}" for each in actions)


def test_spelled_out() -> None:
    assert spelled("1f1b", 0) == "F0 F1 B0 W0 F2 B1 W1 F3 B2 W2 B3 W3"
    assert spelled("1f1b", 1) == "F0 B0 W0 F1 B1 W1 F2 B2 W2 F3 B3 W3"
    assert spelled("gpipe", 1) == "F0 F1 F2 F3 B0 W0 B1 W1 B2 W2 B3 W3"
    assert spelled("zero_bubble", 0) == "F0 F1 F2 B0 W0 B1 F3 B2 W1 W2 B3 W3"
    assert spelled("zero_bubble", 1) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"
