"""A cluster's cores in one process under one seed: an in-memory network that loses, doubles, delays and reorders.

Sums are symbolic: a lane's contribution is the text `l3@5`, a join is `(left+right)`, so the canonical tree shows in what is
applied, and a chunk's parameters are the history of what was applied. Workers are the lanes themselves: whoever can see a
version of every chunk may push any block of its step, any number of times.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ps_service.core.messages import (
    Alarm,
    Announce,
    Apply,
    AskInSync,
    Checkpoint,
    Close,
    Contribution,
    Decision,
    DropSums,
    Effect,
    Envelope,
    Forget,
    Join,
    Keep,
    KeepState,
    KeepSum,
    Load,
    Message,
    Outcome,
    Publish,
    Record,
    Records,
    Refill,
    Replicate,
    Send,
)
from ps_service.core.shard import ShardCore
from shardlane.errors import StaleError
from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, RunId, SiteIndex, Step, Timeline, Version
from shardlane.lanes import Block
from shardlane.plan import Member, Placement, Plan
from shardlane.tally import Tally

RUN = RunId("sim")


@dataclass(frozen=True)
class Shape:
    """A small world."""

    num_shards: int = 3
    num_chunks: int = 3
    num_lanes: int = 4
    num_steps: int = 4
    replication: int = 1
    tied_chunks: frozenset[int] = frozenset({0})
    lose: float = 0.1
    double: float = 0.1


@dataclass
class Tensors:
    """What one shard's shell would hold, as text."""

    parameters: dict[ChunkId, tuple[str, ...]] = field(default_factory=dict)
    partials: dict[tuple[ChunkId, SiteIndex, Block], str] = field(default_factory=dict)
    sums: dict[ChunkId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mail:
    to: Incarnation
    envelope: Envelope
    value: str | tuple[str, ...] = ""
    history: tuple[str, ...] = ()


class BrokenInvariant(AssertionError):
    """Carries the number of the invariant (DESIGN.md, section 3)."""


def canonical_lanes(step: int, first: int, size: int) -> str:
    if size == 1:
        return f"l{first}@{step}"
    half = size // 2
    return f"({canonical_lanes(step, first, half)}+{canonical_lanes(step, first + half, half)})"


class World:
    """One seed replays it: `World(seed, shape).run()`."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.shape = shape
        self.random = random.Random(seed)
        self.network: list[Mail] = []
        self.num = Counter[str]()  # what happened how often, so that a test sees that it got somewhere
        self.decisions: dict[int, Decision] = {}
        self.published: dict[ChunkId, Version] = {}
        self.cores: dict[Incarnation, ShardCore] = {}
        self.tensors: dict[Incarnation, Tensors] = {}
        for index in range(shape.num_shards):
            self.start(Incarnation(f"shard-{index}"))
        self.plan = self.first_plan()
        for me in self.cores:
            self.do(me, self.cores[me].on_plan(self.plan))

    def start(self, me: Incarnation) -> None:
        sites = [2 if chunk in self.shape.tied_chunks else 1 for chunk in range(self.shape.num_chunks)]
        self.cores[me] = ShardCore(
            me, num_sites=sites, num_lanes=self.shape.num_lanes, last_version=self.shape.num_steps, decide=self.decide
        )
        self.tensors[me] = Tensors()

    def first_plan(self) -> Plan:
        names = list(self.cores)
        copies = min(self.shape.replication, len(names))
        placements = tuple(
            Placement(tuple(names[(chunk + copy) % len(names)] for copy in range(copies)))
            for chunk in range(self.shape.num_chunks)
        )
        members = tuple(Member(name, "shard", f"{name}:1") for name in names)
        return Plan(PlanNumber(1, 1), RUN, Timeline(0, Version(0)), members, (), (), placements)

    def decide(self, step: Step, records: Sequence[Record]) -> Decision:
        norm, tally = sum(record.square_norm for record in records), Tally.over([record.tally for record in records])
        return Decision(False, 1.0, norm, 0.1, records[0].tokens, 0.0, tally, 0, False, False)

    # ---- a walk --------------------------------------------------------------------------------------------------------

    def run(self, num_events_max: int = 4000) -> None:
        for _ in range(num_events_max):
            if all(core.version >= self.shape.num_steps for core in self.cores.values()):
                break
            self.event()
            self.check()

    def event(self) -> None:
        roll = self.random.random()
        if roll < 0.45 and self.network:
            self.deliver()
        elif roll < 0.95:
            self.push()
        else:
            me = self.random.choice(list(self.cores))
            self.do(me, self.cores[me].on_tick())
            self.num["ticks"] += 1

    def push(self) -> None:
        """Any block of any lanes for the step whose version every chunk has published, or, as a late retry, the one before."""
        version = min(self.published.values())
        step = max(0, version - (self.random.random() < 0.1))
        chunk = ChunkId(self.random.randrange(self.shape.num_chunks))
        site = SiteIndex(self.random.randrange(2 if chunk in self.shape.tied_chunks else 1))
        size = 1 << self.random.randrange(self.shape.num_lanes.bit_length())
        block = Block(Lane(self.random.randrange(self.shape.num_lanes // size) * size), size)
        contribution = Contribution(self.plan.timeline.id, Step(step), block, site, chunk, block.size, 0.0)
        owner = self.plan.placements[chunk].primary
        if owner not in self.cores:
            return
        answer, effects = self.cores[owner].on_push(contribution)
        self.num[answer.outcome.value] += 1
        if answer.outcome is Outcome.COUNTED:
            self.do(owner, effects, value=canonical_lanes(step, block.first, block.size))

    def deliver(self) -> None:
        mail = self.network.pop(self.random.randrange(len(self.network)))
        if self.random.random() < self.shape.lose or mail.to not in self.cores:
            self.num["lost"] += 1
            return
        if self.random.random() < self.shape.double:
            self.network.append(mail)
            self.num["doubled"] += 1
        core = self.cores[mail.to]
        try:
            effects = core.on_message(mail.envelope)
        except StaleError:
            self.num["stale"] += 1
            return
        self.num["delivered"] += 1
        self.do(mail.to, effects, value=mail.value, mail=mail)
        sender = self.cores.get(mail.envelope.sender)
        if sender is not None and self.random.random() >= self.shape.lose:
            sender.on_delivered(mail.to, mail.envelope.message)

    # ---- effects -------------------------------------------------------------------------------------------------------

    def do(self, me: Incarnation, effects: Sequence[Effect], value: object = "", mail: Mail | None = None) -> None:
        todo, tensors = list(effects), self.tensors[me]
        while todo:
            effect = todo.pop(0)
            match effect:
                case Keep():
                    tensors.partials[effect.chunk, effect.site, effect.block] = str(value)
                case Join(chunk=chunk, site=site, left=left, right=right):
                    low, high = tensors.partials.pop((chunk, site, left)), tensors.partials.pop((chunk, site, right))
                    tensors.partials[chunk, site, left.parent] = f"({low}+{high})"
                case Close(chunk=chunk):
                    todo += self.close(me, chunk)
                case KeepSum(chunk=chunk):
                    tensors.sums[chunk] = str(value)
                case KeepState(chunk=chunk):
                    assert mail is not None
                    tensors.parameters[chunk] = mail.history
                    tensors.sums.pop(chunk, None)
                    if effect.with_sum:
                        tensors.sums[chunk] = str(value)
                case Apply(chunk=chunk):
                    tensors.parameters[chunk] = (*tensors.parameters[chunk], tensors.sums.pop(chunk))
                    self.num["applied"] += 1
                case Publish(chunk=chunk, version=version):
                    self.published[chunk] = max(version, self.published.get(chunk, version))
                case DropSums(chunk=chunk, keep_closed=keep_closed):
                    tensors.partials = {key: each for key, each in tensors.partials.items() if key[0] != chunk}
                    if not keep_closed:
                        tensors.sums.pop(chunk, None)
                case Forget(chunk=chunk):
                    tensors.parameters.pop(chunk, None)
                    tensors.sums.pop(chunk, None)
                    tensors.partials = {key: each for key, each in tensors.partials.items() if key[0] != chunk}
                case Load(chunks=chunks):
                    tensors.parameters.update(dict.fromkeys(chunks, ()))
                case Send(to=to, envelope=envelope):
                    self.post(tensors, to, envelope)
                case Announce(step=step, decision=decision):
                    if self.decisions.setdefault(step, decision) != decision:
                        raise BrokenInvariant(f"4: two decisions of step {step}")
                case Alarm(text=text):
                    raise BrokenInvariant(f"alarm: {text}")
                case Checkpoint() | AskInSync():
                    self.num[type(effect).__name__] += 1

    def close(self, me: Incarnation, chunk: ChunkId) -> list[Effect]:
        tensors = self.tensors[me]
        whole = Block(Lane(0), self.shape.num_lanes)
        sites = range(2 if chunk in self.shape.tied_chunks else 1)
        parts = [tensors.partials.pop((chunk, SiteIndex(site), whole)) for site in sites]
        total = tensors.sums[chunk] = "+".join(parts)
        return self.cores[me].on_measured(chunk, square_norm=1.0, digest=zlib.crc32(total.encode()))

    def post(self, tensors: Tensors, to: Incarnation, envelope: Envelope) -> None:
        message: Message = envelope.message
        value, history = "", ()
        if isinstance(message, Replicate):
            value = tensors.sums[message.record.chunk]
        elif isinstance(message, Refill):
            history = tensors.parameters[message.chunk]
            value = tensors.sums.get(message.chunk, "")
        elif isinstance(message, Records):
            self.num["records"] += len(message.records)
        self.network.append(Mail(to, envelope, value, history))

    # ---- what must hold after every event -----------------------------------------------------------------------------

    def check(self) -> None:
        versions = [core.version for core in self.cores.values() if core.chunks]
        if max(versions) - min(versions) > 1:
            raise BrokenInvariant(f"4: shards at versions {versions}")
        for me, core in self.cores.items():
            for chunk, held in core.chunks.items():
                history = self.tensors[me].parameters[chunk]
                if history != self.expected(chunk, held.version):
                    raise BrokenInvariant(f"1, 2: chunk {chunk} at version {held.version} on {me} is {history}")
                if (held.closed is not None) != (chunk in self.tensors[me].sums):
                    raise BrokenInvariant(f"1: chunk {chunk} on {me}: record and sum do not go together")

    def expected(self, chunk: ChunkId, version: int) -> tuple[str, ...]:
        def total(step: int) -> str:
            lanes = canonical_lanes(step, 0, self.shape.num_lanes)
            return f"{lanes}+{lanes}" if chunk in self.shape.tied_chunks else lanes

        return tuple(total(step) for step in range(version))
