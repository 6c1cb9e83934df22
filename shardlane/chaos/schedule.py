"""Which fault comes when: a pure function of a seed. No clock and no I/O here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shardlane.errors import UserError


class Kind(StrEnum):
    KILL = "kill"  # SIGKILL; the supervisor starts another life
    STOP = "stop"  # SIGSTOP until it was noticed, then SIGCONT: a machine that hangs and comes back
    HALF_OPEN = "half-open"  # its connections carry nothing and stay open: a cable that was pulled


class Pair(StrEnum):
    """Two kills at once."""

    WORKER_SHARD = "worker+shard"
    SHARD_COORDINATOR = "shard+coordinator"
    SHARD_BACKUP = "shard+backup"  # every copy of some chunks: the run goes back to its checkpoint


ROLES = ("worker", "shard", "coordinator")


@dataclass(frozen=True, slots=True)
class Shape:
    stages: int
    replicas: int
    shards: int
    copies: int = 2  # of every chunk

    @property
    def num_workers(self) -> int:
        return self.stages * self.replicas

    def place(self, stage: int) -> str:
        """Of a stage in the pipeline, for people: ends and middle fail differently."""
        if self.stages == 1:
            return "only stage"
        return "first stage" if stage == 0 else "last stage" if stage == self.stages - 1 else "middle stage"


@dataclass(frozen=True, slots=True)
class Target:
    """A place in the cluster, not a process: whoever holds it when the fault comes is hit."""

    role: str
    index: int = 0  # of the shard, or of the worker's replica
    stage: int = 0

    def __str__(self) -> str:
        match self.role:
            case "worker":
                return f"worker of replica {self.index}, stage {self.stage}"
            case "shard":
                return f"shard {self.index}"
        return self.role


@dataclass(frozen=True, slots=True)
class Event:
    """`targets` are hit at one moment, in this order, `delay_seconds` after the cluster is found whole."""

    group: str  # what it is counted under, such as "worker, first stage"
    kind: Kind
    targets: tuple[Target, ...]
    delay_seconds: float
    rolls_back: bool = False  # whether it is one that must cost steps


@dataclass(frozen=True)
class Schedule:
    """`mean_seconds` between faults by role; a role without one is left alone."""

    shape: Shape
    mean_seconds: Mapping[str, float]
    seed: int
    kinds: Sequence[Kind] = (Kind.KILL,)
    pairs: Sequence[Pair] = ()  # given: these are all that happens
    each: int | None = None  # faults of every group, if they are counted

    def __post_init__(self) -> None:
        """Raises `UserError`."""
        if not self.groups:
            raise UserError("no fault would ever come: give --kinds, and a mean time between faults that is not 0")
        if Pair.SHARD_BACKUP in self.pairs and self.shape.copies < 2:
            raise UserError(f"--pairs {Pair.SHARD_BACKUP} needs a backup: at least --shards 2, and cluster.replication 2")

    @property
    def groups(self) -> dict[str, float]:
        """What faults are counted under, and how many come a second."""
        rates = {role: 1.0 / seconds for role, seconds in self.mean_seconds.items() if seconds > 0}
        if self.pairs:
            return {pair: sum(rates.values()) / len(self.pairs) for pair in self.pairs} if rates else {}
        found: dict[str, float] = {}
        for role in ROLES:
            if role not in rates:
                continue
            names = [role]
            if role == "worker":
                names = list(dict.fromkeys(f"worker, {self.shape.place(stage)}" for stage in range(self.shape.stages)))
            found |= {f"{name}, {kind}": rates[role] / len(names) / len(self.kinds) for name in names for kind in self.kinds}
        return found

    @property
    def num_events(self) -> int | None:
        return None if self.each is None else self.each * len(self.groups)

    def events(self) -> Iterator[Event]:
        """Delays are exponential with the rates' sum; which group is hit goes by its rate."""
        rng = random.Random(self.seed)
        rates = self.groups
        left = dict.fromkeys(rates, self.each)
        while left:
            delay = rng.expovariate(sum(rates.values()))
            group = rng.choices(list(left), [rates[name] for name in left])[0]
            yield self._event(group, delay, rng)
            if (count := left[group]) is not None:
                left[group] = count - 1
                if count == 1:
                    del left[group]

    def _event(self, group: str, delay: float, rng: random.Random) -> Event:
        shape = self.shape
        if self.pairs:
            shard = Target("shard", rng.randrange(shape.shards))
            match pair := Pair(group):
                case Pair.WORKER_SHARD:
                    targets = (Target("worker", rng.randrange(shape.replicas), rng.randrange(shape.stages)), shard)
                case Pair.SHARD_COORDINATOR:
                    targets = (shard, Target("coordinator"))
                case Pair.SHARD_BACKUP:
                    targets = (shard, Target("shard", (shard.index + rng.randrange(1, shape.shards)) % shape.shards))
            return Event(group, Kind.KILL, targets, delay, rolls_back=shape.copies < 2 or pair is Pair.SHARD_BACKUP)
        name, _, kind = group.rpartition(", ")
        role, _, place = name.partition(", ")
        match role:
            case "worker":
                stage = rng.choice([stage for stage in range(shape.stages) if shape.place(stage) == place])
                target = Target(role, rng.randrange(shape.replicas), stage)
            case "shard":
                target = Target(role, rng.randrange(shape.shards))
            case _:
                target = Target(role)
        return Event(group, Kind(kind), (target,), delay, rolls_back=shape.copies < 2 and role == "shard")
