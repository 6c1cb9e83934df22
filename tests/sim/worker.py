"""A worker around its stepper, as `worker_service/service.py` and `seat.py` build it. What it computes are texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, assert_never

from coordinator.core.events import Heartbeat, ValidationReport
from shardlane.ids import Incarnation, Lane, MicroBatch, PlanNumber, Version
from shardlane.lanes import Block, lane
from shardlane.plan import Plan
from shardlane.turns import version_told
from tests.sim.links import ACTIVATION, GRADIENT, STANDING, VALIDATION, Inbox, Item, Link
from tests.sim.member import MemberProcess
from tests.sim.oracle import BrokenInvariant
from tests.sim.pulls import Puller
from tests.sim.pushes import Pusher
from worker_service.core import events
from worker_service.core.events import Key, Refusal
from worker_service.core.schedule import Backward, Forward, Weights, schedule
from worker_service.core.stepper import Phase, Stepper
from worker_service.core.turns import TurnStepper
from worker_service.pace import Pace

if TYPE_CHECKING:
    from tests.sim.coordinator import Reply
    from tests.sim.world import World

_SITTING = (events.Begin, events.Rest, events.Leave)
_NO_PLAN = PlanNumber(0, 0)
Pause = float | Callable[[], bool]  # seconds of computing, or what is waited for


class Seat:
    """One stage of one replica: links to its neighbours, pulls and pushes."""

    def __init__(self, worker: WorkerProcess, plan: Plan, replica: int, stage: int) -> None:
        self.worker, self.plan, self.stage = worker, plan, stage
        self.chain, self._formed = plan.replicas[replica].workers, plan.replicas[replica].formed
        self.layers = plan.stages[stage]
        self.items = worker.world.layout.stage_chunks(self.layers)
        self.published = Version(0)
        self.puller = Puller(worker, plan, [item.chunk.id for item in self.items])
        self.pusher = Pusher(worker, plan)
        self.parameters_version = -1
        self.computed_seconds = 0.0
        self._was_skipped = False  # what was waited for last will not come
        self.above, self.below = self._link(stage - 1), self._link(stage + 1)
        worker.inbox.open(self._formed, is_seated=True)

    def _link(self, stage: int) -> Link | None:
        there = 0 <= stage < len(self.chain)
        return Link(self.worker, self.chain[stage], self._formed, self.newest, is_above=stage > self.stage) if there else None

    def newest(self) -> Version:
        return max(self.published, self.puller.published)

    def reroute(self, plan: Plan) -> None:
        if plan.number > self.plan.number:
            self.plan = plan
            self.pusher.reroute(plan)
            self.puller.reroute(plan)

    def close(self) -> None:
        self.puller.cancel()
        self.pusher.close()
        for link in (self.above, self.below):
            if link is not None:
                link.close()

    # ---- what the thread that computes does ---------------------------------------------------------------------------

    def pull(self, pull: events.Pull) -> Iterator[Pause]:
        """Returns, by `StopIteration`, the version that supersedes it, if one does."""
        puller, world, version = self.puller, self.worker.world, pull.version
        puller.open(version)
        yield lambda: puller.asked[version].settled
        asked = puller.asked[version]
        if asked.superseded is not None:
            puller.drop(version)
            if world.config.train.goes_by_turns:
                self.worker.inbox.skip(version)
            return asked.superseded
        for chunk, history in asked.values.items():
            if not world.oracle.is_published(self.plan.timeline, chunk, version, history):
                raise BrokenInvariant(f"8: version {version} of chunk {chunk} was read as {history}")
        if asked.values.keys() != {item.chunk.id for item in self.items}:
            raise BrokenInvariant(f"8: of version {version} only {sorted(asked.values)} were read")
        self.parameters_version = version
        if not world.config.train.goes_by_turns:
            self.published = pull.published
        self.pusher.begin(pull.published)
        self.worker.inbox.begin(pull.step, version, pull.published)
        for link in (self.above, self.below):
            if link is not None:
                link.begin(pull.published)
                if world.config.train.staleness and pull.published >= pull.step:
                    link.send(Item(STANDING, version, 0))
        return None

    def wait_turn(self, wait: events.Await) -> Iterator[Pause]:
        """Returns, by `StopIteration`, the turn that may be taken next."""
        for each in wait.numbers:
            self.puller.ask(each)

        def found() -> list[Version]:
            return self.puller.come(wait.numbers) if wait.numbers else self.worker.inbox.offered(only_last=wait.only_last)

        yield lambda: bool(found())
        return min(found()) if wait.numbers else found()[0]

    def run(self, version: Version, blocks: tuple[Block, ...]) -> Iterator[Pause]:
        """The step of `version`. Every lane and stage reads what SSP says: nothing older, and nothing newer is waited for."""
        config = self.worker.world.config
        if self.parameters_version != config.train.reads(version):
            raise BrokenInvariant(f"4: step {version} is computed from version {self.parameters_version}")
        if config.goes_by_lanes:
            blocks = tuple(lane(each) for block in blocks for each in block.lanes)
        self.worker.world.num["computed ahead"] += config.train.staleness > 0 and version > self.worker.world.version
        lanes = [MicroBatch(each) for block in blocks for each in block.lanes]
        world, due = self.worker.world, {block: set(block.lanes) for block in blocks}
        for action in schedule(world.config.pipeline.schedule, self.stage, len(self.chain), lanes):
            match action:
                case Forward(index):
                    if self.above is not None:
                        yield self._taken(ACTIVATION, version, index)
                        if self._is_over(version):
                            return
                    if self.below is not None:
                        self.below.send(Item(ACTIVATION, version, index))
                case Backward(index):
                    if self.below is not None:
                        yield self._taken(GRADIENT, version, index)
                        if self._is_over(version):
                            return
                    if self.above is not None:
                        self.above.send(Item(GRADIENT, version, index))
                case Weights(index):
                    seconds = self.worker.seconds_a_lane * (0.5 + world.random.random())
                    yield seconds
                    self.computed_seconds += seconds
                    self._add(version, Lane(index), due)

    def _taken(self, kind: str, version: Version, index: int) -> Callable[[], bool]:
        items, key = self.worker.inbox, (kind, version, index)
        goes_by_turns = self.worker.world.config.train.goes_by_turns

        def take() -> bool:
            self._was_skipped = False
            if key in items.items:
                del items.items[key]
                return True
            if items.is_skipped(key):
                self._was_skipped = True
                return True
            self._was_skipped = kind == VALIDATION and goes_by_turns and self._is_over(version)
            return (kind != VALIDATION and self._is_over(version)) or self._was_skipped

        return take

    def _is_over(self, version: Version) -> bool:
        """The next version is published, so nothing of this step is needed any more, and neighbours may have left it."""
        return self.puller.is_past(version)

    def _add(self, step: Version, lane: Lane, due: dict[Block, set[int]]) -> None:
        """A block is pushed when its last lane is in."""
        for block, lanes in due.items():
            if lane in lanes:
                lanes.discard(lane)
                if not lanes:
                    for item in self.items:
                        self.pusher.put(Key(step, item.chunk.id, item.site, block))

    def validate(self, version: Version, indices: tuple[int, ...]) -> Iterator[Pause]:
        for index in indices:
            if self.above is not None:
                yield self._taken(VALIDATION, version, index)
                if self._was_skipped:
                    return
            yield self.worker.seconds_a_lane
            if self.below is not None:
                self.below.send(Item(VALIDATION, version, index))
            else:
                train = self.worker.world.config.train
                told = version_told(version, train.lanes) if train.goes_by_turns else version
                self.worker.report(ValidationReport(self.worker.me, told, index, 1.0, 1))


class WorkerProcess(MemberProcess):
    role = "worker"

    def __init__(self, world: World, incarnation: Incarnation, address: str) -> None:
        super().__init__(world, incarnation, address)
        self.stepper = (TurnStepper if world.config.train.goes_by_turns else Stepper)(incarnation, world.config)
        self.inbox = Inbox(self)
        self.seconds_a_lane = world.shape.seconds_a_lane * (0.5 + world.random.random())
        self.seat: Seat | None = None
        self.pace = Pace()
        self._routing: Plan | None = None
        self._work: deque[events.Work] = deque()
        self._attempt = 0  # counts abandonments
        self._job: Iterator[Pause] | None = None
        self._job_attempt: int | None = None  # None: never abandoned
        self._waits_for: Callable[[], bool] | None = None
        self._is_computing = False
        self._is_pumping = False

    # ---- membership ----------------------------------------------------------------------------------------------------

    def beat_content(self) -> Heartbeat:
        number = self.stepper.plan.number if self.stepper.plan is not None else _NO_PLAN
        return Heartbeat(self.me, number, self.stepper.step, lane_seconds=self.pace.lane_seconds, is_leaving=self.is_leaving)

    def on_reply(self, reply: Reply) -> None:
        self.post(events.StateChanged(reply.state.name.lower()))  # type: ignore[arg-type]

    def on_plan(self, plan: Plan) -> None:
        self.post(events.PlanAdopted(plan))

    # ---- what happens --------------------------------------------------------------------------------------------------

    def on_answers(self, refusals: tuple[Refusal, ...]) -> None:
        self.post(events.Answered(refusals))

    def on_pull_ended(self, shard: Incarnation) -> None:
        self.post(events.PullEnded(shard))

    def post(self, event: events.Event) -> None:
        for effect in self.stepper.handle(event):
            self._do(effect)
        self.pump()

    def _do(self, effect: events.Effect) -> None:
        seat = self.seat
        match effect:
            case events.Abandon():
                self._work = deque(work for work in self._work if isinstance(work, _SITTING))
                self._attempt += 1
            case events.Reroute(plan):
                self._routing = plan
                if seat is not None:
                    seat.reroute(plan)
            case events.PushAgain(keys):
                if seat is not None:
                    seat.pusher.again(keys)
            case events.PushAllAgain(shard):
                if seat is not None:
                    seat.pusher.all_again(shard)
            case events.AskAbove(version, lane):
                self.world.num["lanes asked"] += 1
                if seat is not None and seat.above is not None:
                    seat.above.send(Item(GRADIENT, version, lane, is_word=True))
            case events.TellBelow(version, lane):
                if seat is not None and seat.below is not None:
                    seat.below.send(Item(ACTIVATION, version, lane, is_word=True))
            case events.Reopen(version, lane):
                if seat is not None:
                    self.inbox.run_again(version, lane)
            case events.Begin() | events.Rest() | events.Leave():
                self._work = deque([effect])
            case events.Ask() | events.Await() | events.Pull() | events.Validate() | events.Run():
                self._work.append(effect)
            case _:
                assert_never(effect)

    # ---- the thread that computes --------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Goes on as far as it can."""
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            while self._go_on():
                pass
        finally:
            self._is_pumping = False

    def _go_on(self) -> bool:
        if self._is_computing:
            return False
        if self._job is None:
            if not self._work:
                return False
            work = self._work.popleft()
            self._job_attempt = None if isinstance(work, _SITTING) else self._attempt
            self._job = self._perform(work)
        elif self._job_attempt is not None and self._job_attempt != self._attempt:
            self._job, self._waits_for = None, None  # abandoned
            return True
        elif self._waits_for is not None:
            if not self._waits_for():
                return False
            self._waits_for = None
        try:
            pause = next(self._job)
        except StopIteration:
            self._job = None
            return True
        if callable(pause):
            self._waits_for = pause
            return True
        self._is_computing = True
        self.clock.after(pause, self, self._computed)
        return False

    def _computed(self) -> None:
        self._is_computing = False
        self.pump()

    def _perform(self, work: events.Work) -> Iterator[Pause]:
        seat = self.seat
        match work:
            case events.Begin() | events.Rest() | events.Leave():
                yield from self._sit(work)
                return
            case _:
                assert seat is not None, f"{work} without a seat"
        match work:
            case events.Ask(version):
                seat.puller.ask(version)
            case events.Await(attempt):
                number = yield from seat.wait_turn(work)  # type: ignore[func-returns-value]
                self.post(events.Offered(attempt, number))
            case events.Pull(attempt):
                self._check_wait(work)
                now = yield from seat.pull(work)  # type: ignore[func-returns-value]
                self.post(events.Pulled(attempt) if now is None else events.Superseded(attempt, now))
            case events.Validate(attempt, version, indices):
                yield from seat.validate(version, indices)
                self.post(events.Validated(attempt))
            case events.Run(attempt, version, blocks):
                began = seat.computed_seconds
                yield from seat.run(version, blocks)
                self.pace.add(seat.computed_seconds - began, sum(block.size for block in blocks))
                self.post(events.Ran(attempt, seat.newest()))
            case _:
                assert_never(work)

    def _check_wait(self, pull: events.Pull) -> None:
        """No lane waits for a version that its next step does not read: but at the end, before another seat, and while held."""
        train, stepper = self.world.config.train, self.stepper
        if isinstance(stepper, TurnStepper):
            return
        is_excused = stepper._awaited is not None or pull.step >= train.last_step or stepper.phase is Phase.HELD
        is_read = max(pull.step - train.staleness, min(pull.step, train.staleness_warmup_steps))
        if pull.version > is_read and not is_excused:
            raise BrokenInvariant(f"4: step {pull.step} waits for version {pull.version}, which it does not read")

    def _sit(self, work: events.Begin | events.Rest | events.Leave) -> Iterator[Pause]:
        old, self.seat = self.seat, None
        self.pace = Pace()
        if old is not None:
            old.close()
        yield 0.002
        match work:
            case events.Begin(plan, replica, stage):
                seat = Seat(self, plan, replica, stage)
                if self._routing is not None:
                    seat.reroute(self._routing)
                self.seat = seat
            case events.Rest(plan):
                self.inbox.open(plan.number, is_seated=False)
            case events.Leave():
                pass
