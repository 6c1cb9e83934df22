"""A shard around its core, as `ps_service/shard.py`, `servicer.py`, `service.py` and `peers.py` build it."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, assert_never

from coordinator.core.events import CheckpointReport, Heartbeat, StepSummary
from ps_service.core.holdings import Terms
from ps_service.core.messages import (
    Alarm,
    Announce,
    Answer,
    Apply,
    AskInSync,
    Checkpoint,
    Close,
    Compare,
    Contribution,
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
    Refill,
    Replicate,
    Send,
)
from ps_service.core.shard import ShardCore
from shardlane.errors import StaleError
from shardlane.ids import ChunkId, Incarnation, PlanNumber, SiteIndex, Version
from shardlane.plan import Plan
from shardlane.turns import Clocks
from tests.sim.member import MemberProcess
from tests.sim.network import RefusedError
from tests.sim.oracle import BrokenInvariant
from tests.sim.sketch import SKIPPED, History
from tests.sim.texts import Texts, has_come_to

if TYPE_CHECKING:
    from tests.sim.coordinator import Reply
    from tests.sim.pulls import PullCall
    from tests.sim.world import World

TICK_SECONDS = 1.0  # see ps_service/service.py
RETRY_SECONDS = 0.2  # see ps_service/peers.py
CALL_SECONDS_MAX = 5.0  # the same
_NO_PLAN = PlanNumber(0, 0)


class Parcel(NamedTuple):
    """A message with the values that go along."""

    envelope: Envelope
    total: str
    history: History
    copies: tuple[History, ...] = ()


class Batch(NamedTuple):
    """What a push is answered: for each contribution, and a plan if the sender's may be old."""

    answers: list[Answer]
    plan: Plan | None


class ShardProcess(MemberProcess):
    role = "shard"

    def __init__(self, world: World, incarnation: Incarnation, address: str) -> None:
        super().__init__(world, incarnation, address)
        self.core = ShardCore(incarnation, Terms.of(world.config, world.layout), decide=world.decide)
        self.texts = Texts()
        self.published: dict[ChunkId, tuple[Version, Clocks]] = {}
        self.pulls: list[PullCall] = []
        self.snapshots_left = 0
        self._summaries: deque[StepSummary] = deque()
        self._retrying: set[Incarnation] = set()
        self._num_snapshots = 0
        self._oldest_ticked = -2

    def start(self) -> None:
        super().start()
        self.clock.after(TICK_SECONDS, self, self._tick)

    def on_killed(self) -> None:
        for call in self.pulls:
            self.clock.after(self.network.latency(), call.worker, call.on_failed)

    @property
    def oldest(self) -> int:
        return min((version for version, _ in self.published.values()), default=-1)

    @property
    def timeline(self) -> int:
        assert self.core.plan is not None
        return self.core.plan.timeline.id

    # ---- membership ----------------------------------------------------------------------------------------------------

    def beat_content(self) -> Heartbeat:
        number = _NO_PLAN if self.core.plan is None else self.core.plan.number
        version = Version(max(self.oldest, 0))
        caught_up = dict(self.core.caught_up())
        return Heartbeat(
            self.me,
            number,
            version,
            tuple(self._summaries),
            caught_up=caught_up,
            diverged=frozenset(self.core.diverged),
            is_leaving=self.is_leaving,
        )

    def on_reply(self, reply: Reply) -> None:
        """As `Shard.hear`."""
        if self.core.plan is None or self.core.plan.timeline.id != reply.timeline:
            return
        while self._summaries and self._summaries[0].step < reply.acknowledged_steps:
            self._summaries.popleft()
        self.core.requests |= reply.requests

    def on_plan(self, plan: Plan) -> None:
        """As `Shard.adopt`."""
        before = self.core.plan
        effects = self.core.on_plan(plan)
        if self.core.plan is before:
            return
        self.world.num["plans adopted"] += 1
        if before is not None and plan.timeline != before.timeline:
            self._summaries.clear()
        waiting, self.pulls = self.pulls, []
        for call in waiting:
            self._end_pull(call)
        for chunk, placement in enumerate(plan.placements):
            if placement.primary != self.me:
                self.published.pop(ChunkId(chunk), None)
        self._do(effects)

    def _tick(self) -> None:
        if self.core.plan is not None and self.oldest == self._oldest_ticked:
            self._do(self.core.on_tick())
        self._oldest_ticked = self.oldest
        self.clock.after(TICK_SECONDS, self, self._tick)

    # ---- pushes and pulls ----------------------------------------------------------------------------------------------

    def push(self, batch: Sequence[tuple[Contribution, str]]) -> Batch:
        answers = []
        for contribution, value in batch:
            answer, effects = self.core.on_push(contribution)
            self.world.num[answer.outcome.value] += 1
            self._do(effects, value)
            answers.append(answer)
        is_old = any(answer.outcome in (Outcome.NOT_OWNER, Outcome.STALE) for answer in answers)
        return Batch(answers, self.core.plan if is_old else None)

    def pull(self, call: PullCall) -> None:
        plan = self.core.plan
        if plan is None:
            self.network.tell(self, call.worker, call.on_failed, call.on_failed)
            return
        for chunk in list(call.waiting):
            if call.timeline != plan.timeline.id or plan.placements[chunk].primary != self.me:
                call.waiting.discard(chunk)
                self._answer(call, lambda call=call, chunk=chunk: call.on_refused(chunk, plan))
        self.pulls.append(call)
        self._answer_pulls()

    def _answer_pulls(self) -> None:
        for call in list(self.pulls):
            ready = [chunk for chunk in sorted(call.waiting) if has_come_to(self.published.get(chunk), call.version)]
            for chunk in ready:
                call.waiting.discard(chunk)
                held = self.core.chunks.get(chunk)
                if held is None:
                    continue
                now, past = self.texts.past(chunk, held, call.version, self.world.config.train.num_past)
                if past is not None:
                    self._answer(call, lambda call=call, chunk=chunk, past=past: call.on_data(chunk, past))
                else:
                    self._answer(call, lambda call=call, now=now: call.on_superseded(now))
            if not call.waiting:
                self.pulls.remove(call)
                self._end_pull(call)

    def _answer(self, call: PullCall, action: Callable[[], None]) -> None:
        """In order, as a stream is."""
        call.arrives = self.network.tell(self, call.worker, action, call.on_failed, not_before=call.arrives)

    def _end_pull(self, call: PullCall) -> None:
        self._answer(call, call.on_end)

    # ---- other shards --------------------------------------------------------------------------------------------------

    def deliver(self, parcel: Parcel) -> Plan | None:
        """A newer plan, if the sender's is older."""
        try:
            effects = self.core.on_message(parcel.envelope)
        except StaleError as error:
            self.world.num["stale"] += 1
            raise RefusedError("stale") from error
        self._do(effects, parcel.total, parcel.history, parcel.copies)
        plan = self.core.plan
        return plan if plan is not None and parcel.envelope.plan < plan.number else None

    def _linger(self) -> float:
        """A call goes on while there is more to say, and only its end says that its messages were processed."""
        return CALL_SECONDS_MAX * self.world.random.random() ** 6

    def _send(self, send: Send) -> None:
        assert self.core.plan is not None
        if send.to not in self.core.plan.addresses:
            return
        peer, parcel = self.world.shards.get(send.to), self._pack(send.envelope)

        def on_reply(plan: Plan | None) -> None:
            self.clock.after(self._linger(), self, lambda: end(plan))

        def end(plan: Plan | None) -> None:
            self.core.on_delivered(send.to, send.envelope)
            if plan is not None:
                self.offer(plan)

        def on_failure(_: RefusedError | None) -> None:
            if send.to not in self._retrying:
                self._retrying.add(send.to)
                self.clock.after(RETRY_SECONDS, self, lambda: self._retry(send.to))

        self.network.call(self, peer, lambda: peer.deliver(parcel) if peer is not None else None, on_reply, on_failure)

    def _retry(self, peer: Incarnation) -> None:
        self._retrying.discard(peer)
        self._do(self.core.on_lost(peer))

    def _pack(self, envelope: Envelope) -> Parcel:
        message: Message = envelope.message
        if isinstance(message, Replicate):
            digest = self._parameters_digest(message.record.chunk) if message.is_compared else 0
            envelope = replace(envelope, message=replace(message, parameters_digest=digest))
            return Parcel(envelope, self.texts.sums[message.record.chunk], ())
        if isinstance(message, Refill):
            total = self.texts.sums[message.chunk] if message.closed is not None else ""
            copies = tuple(self.texts.copies.get(message.chunk, ()))
            return Parcel(envelope, total, self.texts.parameters[message.chunk], copies)
        return Parcel(envelope, "", ())

    def _parameters_digest(self, chunk: ChunkId) -> int:
        return zlib.crc32("|".join(self.texts.parameters[chunk]).encode()) or 1

    # ---- effects -------------------------------------------------------------------------------------------------------

    def _do(self, effects: Sequence[Effect], value: str = "", history: History = (), copies: tuple[History, ...] = ()) -> None:
        """`value`, `history`, `copies`: what came with the event."""
        if effects:
            todo = deque(effects)
            while todo:
                if isinstance(effect := todo.popleft(), KeepState):
                    self.texts.copies[effect.chunk] = list(copies)
                self._do_one(effect, todo, value, history)
        self.world.on_shard_event(self)

    def _do_one(self, effect: Effect, todo: deque[Effect], value: str, history: History) -> None:
        texts = self.texts
        match effect:
            case Send():
                self._send(effect)
            case Keep():
                texts.partials[effect.chunk, effect.step, effect.site, effect.block] = value
            case Join(step, chunk, site, left, right):
                low, high = texts.partials.pop((chunk, step, site, left)), texts.partials.pop((chunk, step, site, right))
                texts.partials[chunk, step, site, left.parent] = f"({low}+{high})"
            case Close():
                todo += self._close(effect)
            case KeepSum(chunk=chunk):
                texts.sums[chunk] = value
            case Compare(chunk=chunk, sender=sender, digest=digest):
                is_equal = self._parameters_digest(chunk) == digest
                todo += self.core.on_compared(chunk, sender, is_equal=is_equal)
            case KeepState(chunk=chunk):
                texts.drop_partials(chunk)
                texts.sums.pop(chunk, None)
                texts.parameters[chunk] = history
                if effect.with_sum:
                    texts.sums[chunk] = value
            case Apply(chunk=chunk):
                self._apply(effect, texts.sums.pop(chunk))
            case Publish(chunk=chunk, version=version):
                self.published[chunk] = version, effect.clocks
                self.world.oracle.publish(self.timeline, chunk, version, texts.parameters[chunk])
                self._answer_pulls()
            case DropSums(chunk=chunk, keep_closed=keep_closed):
                texts.drop_partials(chunk)
                if not keep_closed:
                    texts.sums.pop(chunk, None)
            case Forget(chunk=chunk):
                self.published.pop(chunk, None)
                texts.parameters.pop(chunk, None)
                texts.sums.pop(chunk, None)
                texts.drop_partials(chunk)
            case Load():
                self._load(effect)
            case Announce():
                self._announce(effect)
            case Checkpoint():
                self._take_snapshot(effect)
            case AskInSync():
                self.world.num["asked in sync"] += 1
                self.beat_soon()
            case Alarm(text=text):
                raise BrokenInvariant(f"alarm: {text}")
            case _:
                assert_never(effect)

    def _close(self, effect: Close) -> list[Effect]:
        """With wobbling sums, no two measurements of one sum have the same bits."""
        world, texts = self.world, self.texts
        chunk, step, whole = effect.chunk, effect.step, effect.block
        sites = range(world.layout.num_sites(chunk))
        total = "+".join(texts.partials.pop((chunk, step, SiteIndex(site), whole)) for site in sites)
        if world.shape.wobbles:
            world.num["measured"] += 1
            total = f"{total}~{self.me}/{world.num['measured']}"
        texts.sums[chunk] = total
        digest = zlib.crc32(total.encode())
        norm = math.inf if world.is_not_finite(step) else 1.0 + digest / (1 << 32)
        return self.core.on_measured(chunk, square_norm=norm, digest=digest)

    def _apply(self, effect: Apply, total: str) -> None:
        before = self.texts.parameters[effect.chunk]
        if len(before) != effect.step:
            raise BrokenInvariant(f"4: step {effect.step} of chunk {effect.chunk} is applied to version {len(before)}")
        self.texts.parameters[effect.chunk] = (*before, SKIPPED if effect.scale is None else total)
        if effect.lane is not None:
            self.texts.copies[effect.chunk][effect.lane] = self.texts.parameters[effect.chunk]
        self.world.on_applied()

    def _load(self, effect: Load) -> None:
        manifest = self.world.disk.manifests.get(effect.timeline.digest)
        for chunk in effect.chunks:
            self.texts.parameters[chunk] = () if manifest is None else manifest.histories[chunk]
            self.texts.copies[chunk] = [self.texts.parameters[chunk]] * self.world.shape.num_lanes

    def _announce(self, effect: Announce) -> None:
        decision, step = effect.decision, effect.step
        self.world.oracle.decide(self.timeline, step, decision)
        if self._summaries and self._summaries[-1].step >= step:
            return
        self._summaries.append(
            StepSummary(
                step, decision.loss, decision.grad_norm, decision.learning_rate, decision.tokens, decision.tally,
                decision.skipped, decision.requests, decision.refused,
            )
        )  # fmt: skip

    def _take_snapshot(self, effect: Checkpoint) -> None:
        """Written and told some time later: until then it is gone with this process."""
        world, file = self.world, f"{self.me}-{self._num_snapshots}"
        self._num_snapshots += 1
        timeline = self.timeline
        part = {chunk: self.texts.parameters[chunk] for chunk in effect.chunks}
        clocks = tuple(each.clock for each in self.core.chunks[effect.chunks[0]].clocks)
        self.snapshots_left += 1

        def write() -> None:
            self.snapshots_left -= 1
            world.disk.parts[effect.version, file] = part
            checksums = {chunk: dict[str, str]() for chunk in part}
            self.report(
                CheckpointReport(self.me, effect.version, effect.version, file, 1, checksums, timeline=timeline, clocks=clocks)
            )

        self.clock.after(0.02 + 0.3 * world.random.random() ** 4, self, write)
        self.beat_soon()
