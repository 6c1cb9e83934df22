"""A whole cluster in one process under one seed: the real cores of all three services, joined by an in-memory network.

`World(seed, shape).run()` ends when the run does, or raises: `BrokenInvariant`, or `StuckError` if it does not end. What shells
do around the cores is modelled beside it, in `coordinator.py`, `shard.py` and `worker.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from coordinator.core.events import CommitCheckpoint, Control, RunState, TrainingRow
from ps_service.core.commit import decide
from ps_service.core.messages import Decision, Record
from shardlane.ids import ChunkId, Incarnation, Step, Version
from shardlane.plan import Plan
from tests.sim.coordinator import CoordinatorProcess, Disk, Store
from tests.sim.faults import Drama
from tests.sim.member import MemberProcess
from tests.sim.network import Clock, Network, Process
from tests.sim.oracle import BrokenInvariant, Oracle
from tests.sim.shape import Shape, config_of
from tests.sim.shard import ShardProcess
from tests.sim.sketch import History, Sketch, plainly
from tests.sim.worker import WorkerProcess

NUM_EVENTS_MAX = 20_000
SECONDS_MAX = 90.0
REPAIR_SECONDS = 5.0  # until somebody starts what has been missing


class StuckError(AssertionError):
    """The run did not come to its end."""


class World:
    def __init__(self, seed: int, shape: Shape, say: Callable[[str], None] | None = None) -> None:
        """`say` gets the trace."""
        self.shape, self.config = shape, config_of(shape)
        self.random = random.Random(seed)
        self.layout = Sketch(shape.num_chunks)
        self.num = Counter[str]()  # what happened how often, so that a test sees that it got somewhere
        self.clock = Clock()
        self.network = Network(self.clock, self.random, shape.weather, self.num)
        self.oracle = Oracle(self.layout, shape.num_lanes, self.config.train.goes_by_turns)
        self.store, self.disk = Store(), Disk()
        self.shards: dict[Incarnation, ShardProcess] = {}
        self.workers: dict[Incarnation, WorkerProcess] = {}
        self.coordinator: CoordinatorProcess | None = None
        self.newest_coordinator: CoordinatorProcess | None = None
        self._say = say
        self._num_started = 0
        self._restarts: set[Incarnation] = set()
        self._not_finite = {step for step in range(shape.num_steps) if self.random.random() < 0.1}
        self.drama = Drama(self)

    def say(self, text: str) -> None:
        if self._say is not None:
            self._say(f"{self.clock.now:8.3f} {text}")

    # ---- a schedule ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.begin()
        while not self.is_over:
            self.step()
        self.finish()

    def begin(self) -> None:
        shape = self.shape
        self.start_coordinator()
        for _ in range(shape.num_shards + shape.num_spare_shards):
            self.start_member("shard")
        for _ in range(shape.num_stages * shape.num_replicas + shape.num_spare_workers):
            self.start_member("worker")
        self.clock.after(REPAIR_SECONDS, None, self._repair)

    def _repair(self) -> None:
        """Whoever runs the cluster starts what is missing of it."""
        shape = self.shape
        for members, wanted in ((self.shards, shape.num_shards), (self.workers, shape.num_stages * shape.num_replicas)):
            here = [each for each in members.values() if each.alive and not each.is_leaving]
            if len(here) < wanted:
                self.start_member("shard" if members is self.shards else "worker")
        self.clock.after(REPAIR_SECONDS, None, self._repair)

    def step(self) -> None:
        if self.clock.num_events > NUM_EVENTS_MAX or self.clock.now > SECONDS_MAX or not self.clock.step():
            raise StuckError(self.situation())
        self.drama.advance()

    @property
    def is_over(self) -> bool:
        return (
            self.coordinator is not None and self.coordinator.run.has_ended and not self.coordinator.asleep_until > self.clock.now
        )

    def finish(self) -> None:
        """The end state: the last version is published and in a checkpoint, as if nothing had happened."""
        assert self.coordinator is not None
        run, newest = self.coordinator.run, self.disk.newest
        if run.state is not RunState.FINISHED:
            raise StuckError(f"the run is {run.state.name}: {run.failure}")
        end = run.end_version
        is_short = end < self.config.train.last_step
        if self.config.train.goes_by_turns and newest is not None:
            is_short = sum(newest.clocks) < self.config.train.last_version
        if is_short and not self.num["stop run"]:
            raise BrokenInvariant(f"4: the run ended at version {end}, and nobody asked for that")
        if newest is None or newest.version < end or run.version != end:
            raise BrokenInvariant(f"4: the run ended at version {run.version} of {end}, checkpoint {newest}")
        for chunk in range(self.shape.num_chunks):
            history = newest.histories[ChunkId(chunk)]
            if plainly(history) != self.oracle.expected(newest.timeline, ChunkId(chunk), newest.version):
                raise BrokenInvariant(f"1, 2: chunk {chunk} ends as {history}")
        self.num["commits"] = len(self.oracle.decisions)

    def situation(self) -> str:
        """Who stands where, for a run that is stuck."""
        lines = [f"at {self.clock.now:.1f} s, after {self.clock.num_events} events"]
        if self.coordinator is None:
            lines.append("no coordinator")
        else:
            run = self.coordinator.run
            lines.append(f"{self.coordinator}: {run.state.name} version {run.version} checkpoint {run.checkpoint.version}"
                         f" of {run.end_version} {run.waiting_for} plan {run.plan and run.plan.number}")  # fmt: skip
            if run.plan is not None:
                lines.append(f"  {[(each.in_sync, each.learner) for each in run.plan.placements]}")
                lines.append(f"  {[(each.workers, each.begins_at, each.formed) for each in run.plan.replicas]}")
        for shard in self.shards.values():
            if shard.alive:
                lines.append(f"{shard}: plan {shard.core.plan and shard.core.plan.number} end {shard.core.end_version}")
                for chunk, held in shard.core.chunks.items():
                    lanes = [table.counted for table in held.barrier.sites]
                    acks = f"acks {sorted(held.acks)} awaited {sorted(held.awaited)}"
                    lines.append(f"    chunk {chunk} at {held.version} closed {held.closed is not None} lanes {lanes} {acks}")
                    if held.clocks:
                        ahead = {number: [site.counted for site in table.sites] for number, table in held.ahead.items()}
                        lines.append(f"      turn {held.turn} of {held.clocks}, ahead {ahead}")
        for worker in self.workers.values():
            if worker.alive:
                stepper = worker.stepper
                lines.append(f"{worker}: plan {stepper.plan and stepper.plan.number} {stepper.phase} {stepper.step}")
        return "\n".join(lines)

    # ---- processes -----------------------------------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        self.coordinator = CoordinatorProcess(self)
        self.say(f"{self.coordinator} starts")
        self.coordinator.start()

    def start_member(self, role: str, address: str = "") -> None:
        self._num_started += 1
        number = self._num_started
        where = address or f"host{number}:1"
        name = Incarnation(f"{role}-{number:x}")
        process: MemberProcess
        if role == "shard":
            process = self.shards[name] = ShardProcess(self, name, where)
        else:
            process = self.workers[name] = WorkerProcess(self, name, where)
        self.say(f"{process} starts at {where}")
        process.start()

    def kill(self, process: Process) -> None:
        """It is gone, and everything that it knew. Its neighbours may notice, and the coordinator from its broken stream."""
        if not process.alive:
            return
        process.alive = False
        if isinstance(process, CoordinatorProcess):
            if process is self.coordinator:
                self.say(f"{process} dies")
                self.coordinator = None
                self.clock.after(self.random.choice((0.1, 0.5, 2.0, 5.0)), None, self.start_coordinator)
            return
        assert isinstance(process, MemberProcess)
        process.on_killed()
        if self.random.random() < 0.6:
            self.clock.after(self.network.latency(), None, lambda: self._suspect(process))

    def _suspect(self, process: MemberProcess) -> None:
        coordinator = self.coordinator
        if coordinator is None or self.network.is_cut(coordinator, process):
            return
        self.clock.after(0.0, coordinator, lambda: coordinator.suspect(process.me))

    def restart(self, process: MemberProcess, seconds: float) -> None:
        """A new incarnation, often at the old address."""
        address = process.address if self.random.random() < 0.5 and not process.alive else ""
        self.clock.after(seconds, None, lambda: self.start_member(process.role, address))

    def resume_later(self, seconds: float) -> None:
        def resume() -> None:
            coordinator = self.coordinator
            if coordinator is not None:
                coordinator.control(Control.RESUME)
            if coordinator is None or not coordinator.alive:
                self.resume_later(seconds)

        self.clock.after(seconds, None, resume)

    # ---- what processes tell -------------------------------------------------------------------------------------------

    def decide(self, step: Step, records: Sequence[Record]) -> Decision:
        return decide(step, records, config=self.config, loss_chunk=self.layout.loss_chunk)

    def is_not_finite(self, step: int) -> bool:
        """Whether the gradients of `step` are not: it will be skipped."""
        return step in self._not_finite

    def on_announced(self, coordinator: CoordinatorProcess, plan: Plan) -> None:
        self.num["plans"] += 1
        manifest = self.disk.manifests.get(plan.timeline.digest)
        if plan.timeline.id not in self.oracle.lineages and plan.timeline.id:
            self.num["roll-backs"] += 1
        self.oracle.announce(plan, None if manifest is None else manifest.timeline)
        self.say(f"plan {plan.number}: {plan.reason}")
        for process in (*self.shards.values(), *self.workers.values()):
            if process.alive:
                self.network.tell(coordinator, process, lambda process=process: process.offer(plan))

    def on_row(self, coordinator: CoordinatorProcess, row: TrainingRow) -> None:
        """The coordinator takes a step for done: one that its timeline has decided, or that a checkpoint holds."""
        timeline, step = coordinator.run.timeline.id, row.summary.step
        decision = self.oracle.decisions.get((timeline, step))
        if decision is None or decision.requests != row.summary.requests:
            raise BrokenInvariant(f"4: timeline {timeline} has decided {decision} on step {step}, {coordinator} hears {row}")

    def on_applied(self) -> None:
        self.num["applied"] += 1

    def on_shard_event(self, shard: ShardProcess) -> None:
        before = self.num["applied"]
        self.oracle.inspect(shard, self.shards.values())
        if before != self.num["compared"]:
            self.num["compared"] = before
            self.oracle.compare(self.shards.values())
        if shard.has_left:
            self.kill(shard)

    def check_part(self, commit: CommitCheckpoint, chunk: ChunkId, history: History, other: History | None) -> None:
        """A part of a checkpoint is what was published of its version."""
        published = self.oracle.published.get((commit.timeline, chunk, commit.version))
        if history != published or (other is not None and history != other):
            raise BrokenInvariant(
                f"8: the checkpoint of version {commit.version} has {history} of chunk {chunk}, not {published}"
            )

    @property
    def version(self) -> Version:
        """The newest published."""
        return Version(self.oracle.version)
