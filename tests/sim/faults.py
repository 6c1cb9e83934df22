"""What befalls a world: drawn from its seed, each at a moment between two events, while a certain version is under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.core.events import Control
from tests.sim.member import MemberProcess
from tests.sim.network import Process

if TYPE_CHECKING:
    from tests.sim.world import World

EVENTS_A_LANE = 15  # from a version to within its step, at most: so that what is drawn happens before the run is over


@dataclass
class Fault:
    """`kind` strikes when `version` is published and so many events have passed."""

    kind: str
    version: int
    num_events: int


class Drama:
    """The faults of one schedule."""

    def __init__(self, world: World) -> None:
        self._world = world
        chance, shape = world.random, world.shape
        kinds, weights = list(shape.faults), list(shape.faults.values())
        faults = []
        for kind in chance.choices(kinds, weights, k=chance.randint(1, shape.num_faults_max)) if kinds else ():
            version = chance.randrange(world.config.train.last_version)
            num_lanes = 1 if world.config.train.goes_by_turns else shape.num_lanes
            faults.append(Fault(kind, version, chance.randrange(EVENTS_A_LANE * num_lanes)))
            if chance.random() < 0.3:  # the next one hits while this one is being repaired
                faults.append(Fault(chance.choices(kinds, weights)[0], version, faults[-1].num_events + chance.randrange(40)))
        self._faults = sorted(faults, key=lambda fault: (fault.version, fault.num_events))

    @property
    def is_over(self) -> bool:
        return not self._faults

    def advance(self) -> None:
        """After every event."""
        world = self._world
        if world.oracle.plan is None:
            return
        due = [fault for fault in self._faults if fault.version <= world.oracle.version]
        for fault in due:
            fault.num_events -= 1
            if fault.num_events < 0:
                if self._strike(fault.kind):
                    self._faults.remove(fault)
                else:
                    fault.num_events = 10

    def _strike(self, kind: str) -> bool:
        """Whether there was somebody to be struck."""
        world = self._world
        if not _STRIKES[kind](world):
            return False
        world.num["struck"] += 1
        world.num[kind] += 1
        world.say(f"* {kind}")
        return True


def _seated(world: World, role: str) -> list[MemberProcess]:
    """Who has something to do in the newest plan."""
    plan = world.oracle.plan
    assert plan is not None
    if role == "shard":
        names = {shard for placement in plan.placements for shard in placement.holders}
    else:
        names = {worker for replica in plan.replicas for worker in replica.workers}
    members = world.shards if role == "shard" else world.workers
    return [members[name] for name in sorted(names) if members[name].alive]  # type: ignore[index]


def _pick(world: World, whom: Sequence[MemberProcess]) -> MemberProcess | None:
    return world.random.choice(whom) if whom else None


def _kill(role: str, count: int = 1) -> Callable[[World], bool]:
    def strike(world: World) -> bool:
        whom = _seated(world, role)
        if not whom:
            return False
        for process in world.random.sample(whom, min(count, len(whom))):
            world.say(f"* {process} dies")
            world.kill(process)
            world.restart(process, world.random.choice((0.1, 0.5, 2.0, 5.0)))
        return True

    return strike


def _stop(role: str) -> Callable[[World], bool]:
    """Not dead, and silent: often beyond its lease."""

    def strike(world: World) -> bool:
        process: Process | None = world.coordinator if role == "coordinator" else _pick(world, _seated(world, role))
        if process is None:
            return False
        seconds = world.random.choice((0.2, 1.0, 3.0, 6.0))
        world.say(f"* {process} stands still for {seconds} s")
        process.asleep_until = world.clock.now + seconds
        return True

    return strike


def _part(whom: str) -> Callable[[World], bool]:
    """Someone is cut off, from everybody or from some."""

    def strike(world: World) -> bool:
        everybody: list[Process] = [each for each in (*world.shards.values(), *world.workers.values()) if each.alive]
        if whom == "coordinator":
            island = [world.coordinator] if world.coordinator is not None else []
        elif whom == "all":
            island = [each for each in everybody if world.random.random() < 0.5]
        else:
            one = _pick(world, _seated(world, whom))
            island = [one] if one is not None else []
            if world.random.random() < 0.4:
                island += [each for each in everybody if each is not one and world.random.random() < 0.3]
        if not island:
            return False
        world.say(f"* cut off: {island}")
        world.network.part(dict.fromkeys(island, 1))
        seconds = world.random.choice((0.3, 1.0, 3.0, 6.0))
        world.clock.after(seconds, None, lambda: world.network.part({}))
        return True

    return strike


def _kill_coordinator(world: World) -> bool:
    """At once, or in the midst of the next thing that it does."""
    coordinator = world.coordinator
    if coordinator is None:
        return False
    if world.random.random() < 0.5:
        coordinator.effects_left = world.random.randrange(4)
        world.clock.after(1.0, None, lambda: world.kill(coordinator))
    else:
        world.kill(coordinator)
    return True


def _join(role: str) -> Callable[[World], bool]:
    def strike(world: World) -> bool:
        world.start_member(role)
        return True

    return strike


def _leave(role: str) -> Callable[[World], bool]:
    def strike(world: World) -> bool:
        process = _pick(world, _seated(world, role))
        if process is None or process.is_leaving:
            return False
        world.say(f"* {process} wants to leave")
        process.leave()
        others = [each for each in _seated(world, role) if not each.is_leaving]
        if not others or world.random.random() < 0.5:
            world.restart(process, world.random.choice((0.5, 3.0)))
        return True

    return strike


def _control(action: Control) -> Callable[[World], bool]:
    def strike(world: World) -> bool:
        is_early = action is Control.STOP and world.oracle.version < 2
        if world.coordinator is None or is_early:
            return False
        world.coordinator.control(action)
        if action is Control.PAUSE:
            world.resume_later(world.random.choice((0.2, 1.0)))
        return True

    return strike


_STRIKES: dict[str, Callable[[World], bool]] = {
    "kill shard": _kill("shard"),
    "kill two shards": _kill("shard", 2),
    "kill worker": _kill("worker"),
    "kill coordinator": _kill_coordinator,
    "stop shard": _stop("shard"),
    "stop worker": _stop("worker"),
    "stop coordinator": _stop("coordinator"),
    "part shard": _part("shard"),
    "part worker": _part("worker"),
    "part coordinator": _part("coordinator"),
    "part all": _part("all"),
    "join shard": _join("shard"),
    "join worker": _join("worker"),
    "leave shard": _leave("shard"),
    "leave worker": _leave("worker"),
    "checkpoint": _control(Control.CHECKPOINT),
    "pause run": _control(Control.PAUSE),
    "stop run": _control(Control.STOP),
}
