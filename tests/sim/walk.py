"""Replays schedules: `python -m tests.sim.walk --shape NAME --seed N [--trace]`, or walks from many seeds: `--seeds N`."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.sim.shape import SHAPES
from tests.sim.world import World


class FailedSchedule(AssertionError):
    """Says how to replay it."""


class EmptySchedule(AssertionError):
    """Nothing went wrong, and it proves nothing."""


@dataclass
class Walk:
    """What many schedules came to."""

    num_schedules: int = 0
    num: Counter[str] = field(default_factory=Counter)

    def take(self, world: World) -> None:
        self.num_schedules += 1
        self.num += world.num


def command(name: str, seed: int) -> str:
    return f"python -m tests.sim.walk --shape {name!r} --seed {seed} --trace"


def replay(name: str, seed: int, *, is_traced: bool = False) -> World:
    """Raises `FailedSchedule`."""
    world = World(seed, SHAPES[name], print if is_traced else None)
    try:
        world.run()
        if world.num["commits"] < 2:
            raise EmptySchedule("no two steps were made")
        if not world.num["struck"]:
            raise EmptySchedule("nothing befell it")
    except Exception as broken:
        raise FailedSchedule(f"{type(broken).__name__}: {broken}\n{command(name, seed)}") from broken
    return world


def walk(name: str, seeds: Iterable[int]) -> Walk:
    """Every seed is one schedule. Raises `FailedSchedule`."""
    total = Walk()
    for seed in seeds:
        total.take(replay(name, seed))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.walk", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all of them")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--trace", action="store_true", help="what happens, by simulated seconds")
    arguments = parser.parse_args()
    for name in arguments.shape or SHAPES:
        began, num, num_failed = time.perf_counter(), Counter[str](), 0
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            try:
                num += replay(name, seed, is_traced=arguments.trace).num
            except FailedSchedule as failed:
                num_failed += 1
                print(failed)
        rate = arguments.seeds / (time.perf_counter() - began)
        print(f"{name}: {arguments.seeds} schedules, {num_failed} failed, {rate:.0f} a second; {dict(sorted(num.items()))}")


if __name__ == "__main__":
    main()
