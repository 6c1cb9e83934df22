"""The shard's state machine: events in, effects out. The numbers in comments are the steps of DESIGN.md, section 4.

Roles are fenced by plan number, facts (contributions, records) by timeline. The shell feeds one event at a time and does the
effects in order before the next one. Everything that was sent may be lost, doubled or reordered: `on_tick` sends again what
the present state still asks for.
"""

# isort: skip_file
from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ps_service.core.holdings import Filling, HeldChunk, Terms, stays_with
from ps_service.core.messages import (
    Ack, Alarm, Announce, Answer, Apply, AskInSync, Checkpoint, Close, Compare, Contribution, Decision, DropSums, Effect,
    Envelope, Forget, KeepState, KeepSum, Load, Message, Outcome, Position, Publish, Record, Records, Refill, Replicate, Send,
)  # fmt: skip
from ps_service.core.record_book import DECIDES, Decide, RecordBook
from shardlane.errors import StaleError
from shardlane.ids import ChunkId, Incarnation, Step, Version
from shardlane.plan import Placement, Plan

COMPARED_EVERY_STEPS = 16  # each chunk's copies, a part of the chunks at a time


class ShardCore:
    """One shard. `plan` is None until the first one comes. `decide` gets a step and its records in chunk order."""

    def __init__(self, me: Incarnation, terms: Terms, *, decide: Decide) -> None:
        self.me = me
        self.plan: Plan | None = None
        self.chunks: dict[ChunkId, HeldChunk] = {}
        self.book = RecordBook(len(terms.num_sites), decide)
        self.end_version = terms.last_version  # no step from it on; a stop brings it forward
        self.diverged: set[ChunkId] = set()  # whose copies here were found wrong under the present plan
        self.requests = 0  # REQUEST_* bits for the next record that closes here
        self._terms, self._filling = terms, Filling()

    # ---- what a shell may ask ------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The oldest version among the chunks held; -1 while there are none."""
        return min((held.version for held in self.chunks.values()), default=-1)

    def caught_up(self) -> list[tuple[ChunkId, Incarnation]]:
        """12. Learners that this shard, as primary, waits for and wants to see listed, by chunk."""
        return [(chunk, learner) for chunk, held in self.chunks.items() for learner in held.awaited]

    def is_primary(self, chunk: ChunkId) -> bool:
        return self.plan is not None and chunk in self.chunks and self.plan.placements[chunk].primary == self.me

    def backups(self, chunk: ChunkId) -> list[Incarnation]:
        """Whose acks a chunk's primary waits for."""
        assert self.plan is not None
        return [*self.plan.placements[chunk].in_sync[1:], *self.chunks[chunk].awaited]

    def judge(self, contribution: Contribution) -> Answer:
        """2. What a contribution is answered. Changes nothing, so it may be asked before its values are taken in."""
        if self.plan is None or not self.is_primary(contribution.chunk):
            return Answer(Outcome.NOT_OWNER)
        if contribution.timeline != self.plan.timeline.id:
            return Answer(Outcome.STALE)
        held = self.chunks[contribution.chunk]
        return held.judge(contribution, last=min(held.version + self._terms.staleness, self.end_version - 1))

    # ---- events --------------------------------------------------------------------------------------------------------

    def on_push(self, contribution: Contribution) -> tuple[Answer, list[Effect]]:
        """2. Counts a contribution whose values are all here, once."""
        answer = self.judge(contribution)
        if answer.outcome is not Outcome.COUNTED:
            return answer, []
        held = self.chunks[contribution.chunk]
        return answer, [*held.count(contribution), *self._close(contribution.chunk)]

    def _close(self, chunk: ChunkId) -> list[Effect]:
        """2. If every lane of the open step is in; under ASP, the lane whose turn it is."""
        held = self.chunks[chunk]
        if held.closed is not None or held.measuring is not None or held.version >= self.end_version:
            return []
        held.measuring = held.take_ready(decides=chunk == DECIDES, decided=self.book.turn(Step(held.version)))
        return [] if held.measuring is None else [Close(chunk, Step(held.closing), held.measuring)]

    def on_measured(self, chunk: ChunkId, *, square_norm: float, digest: int) -> list[Effect]:
        """3. The sum has been taken: from now on sum, table and record are one unit."""
        held = self.chunks[chunk]
        barrier, step, block = held.barrier, Step(held.version), held.measuring
        assert block is not None
        figures = (square_norm, barrier.tokens, barrier.loss(block), digest, barrier.tally)
        held.measuring, held.closed = None, Record(step, chunk, *figures, self.requests, held.turn)
        return [*self._replicate(chunk), *self._settle([chunk])]

    def on_plan(self, plan: Plan) -> list[Effect]:
        """1 and 10. Adopts a greater plan. Raises `StaleError` for the same number with another content."""
        old = self.plan
        if old is not None and plan.number <= old.number:
            if plan.number == old.number and plan.digest != old.digest:
                raise StaleError(f"two plans are numbered {plan.number}: {old.digest[:12]} here, {plan.digest[:12]} offered")
            return []
        self.plan = plan
        self.diverged.clear()
        effects: list[Effect] = []
        if old is None or plan.timeline != old.timeline:
            effects += self._begin_timeline()
        to_load: list[ChunkId] = []
        for chunk, placement in enumerate(plan.placements):
            effects += self._take_role(ChunkId(chunk), placement, None if old is None else old.placements[chunk])
            if self.me in placement.in_sync and ChunkId(chunk) not in self.chunks:
                to_load.append(ChunkId(chunk))
        if to_load:
            effects += self._load(plan, to_load, begins=old is None or plan.timeline != old.timeline)
        effects += self._checkpoint_taken_over(old)
        self._filling.begin(chunk for chunk in self.chunks if self.is_primary(chunk) and plan.placements[chunk].learner)
        for chunk in self.chunks:
            effects += [*self._replicate(chunk), *self._tell_position(chunk)]
        return effects + self._send_records() + self._settle(self.chunks) + self._fill()

    def on_message(self, envelope: Envelope) -> list[Effect]:
        """A message of another shard. Raises `StaleError` for one of another timeline."""
        if self.plan is None or envelope.timeline != self.plan.timeline.id:
            raise StaleError(f"a message of timeline {envelope.timeline} from {envelope.sender}")
        message = envelope.message
        if isinstance(message, Records):
            return self._learn(message.records)  # a fact: no epoch
        if envelope.plan != self.plan.number:
            raise StaleError(f"a message of plan {envelope.plan}; the plan here is {self.plan.number}")
        match message:
            case Replicate():
                return self._on_replicate(envelope.sender, message)
            case Ack():
                return self._on_ack(envelope.sender, message)
            case Refill():
                return self._on_refill(envelope.sender, message)
            case Position():
                return self._on_position(envelope.sender, message)

    def on_delivered(self, to: Incarnation, envelope: Envelope) -> None:
        """`to` has processed the message. One of another timeline told it nothing of this one's steps."""
        if isinstance(envelope.message, Records) and self.plan is not None and envelope.timeline == self.plan.timeline.id:
            self.book.delivered(to, envelope.message.records)

    def on_lost(self, to: Incarnation) -> list[Send]:
        """A call to `to` has failed: sends it again what is not known to have arrived."""
        return [each for each in self._resend() if isinstance(each, Send) and each.to == to]

    def on_tick(self) -> list[Effect]:
        """The same for all. And nothing has moved for a while, so learners need not wait for an open step."""
        return self._resend() + [self._refill(chunk) for chunk in self._filling.send(lambda chunk: True)]

    def _resend(self) -> list[Effect]:
        effects = [each for chunk in self.chunks for each in (*self._replicate(chunk, again=True), *self._tell_position(chunk))]
        return effects + [self._refill(chunk) for chunk in self._filling.under_way] + self._send_records()

    # ---- roles ---------------------------------------------------------------------------------------------------------

    def _begin_timeline(self) -> list[Effect]:
        """14. Whatever belongs to another timeline is void."""
        effects: list[Effect] = [Forget(chunk) for chunk in self.chunks]
        self.chunks.clear()
        self.book.clear()
        # A stop is asked for again, unless others go on with the run.
        self.end_version, self.requests = self._terms.last_version, 0
        return effects

    def _take_role(self, chunk: ChunkId, now: Placement, before: Placement | None) -> list[Effect]:
        held = self.chunks.get(chunk)
        if held is None:
            return []
        if not stays_with(self.me, now, before):
            del self.chunks[chunk]
            return [Forget(chunk)]
        held.acks, held.awaited, held.early = set(), set(), None  # acks count in their own epoch only
        if now.primary == self.me and before is not None and before.primary == self.me:
            return []  # what was counted here stays counted
        held.begin()
        return [DropSums(chunk, keep_closed=held.closed is not None), *self._publish(chunk)]  # pulls come here from now on

    def _checkpoint_taken_over(self, old: Plan | None) -> list[Effect]:
        """Who was primary of a chunk may have died before it wrote the version that was to be checkpointed."""
        taken = [each for each in self.chunks if self.is_primary(each) and old and old.placements[each].primary != self.me]
        due = self.book.checkpoints_due({chunk: self.chunks[chunk].version for chunk in taken})
        return [Checkpoint(version, tuple(chunks)) for version, chunks in due.items()]

    def _load(self, plan: Plan, chunks: list[ChunkId], *, begins: bool) -> list[Effect]:
        if not begins:
            return [Alarm(f"plan {plan.number} lists {self.me} in sync for {len(chunks)} chunks that it does not hold")]
        for chunk in chunks:
            self.chunks[chunk] = self._terms.hold(chunk, plan.timeline.version, self._terms.clocks(plan.timeline))
        return [Load(plan.timeline, tuple(chunks)), *(each for chunk in chunks for each in self._publish(chunk))]

    def _publish(self, chunk: ChunkId) -> list[Publish]:
        held = self.chunks[chunk]
        return [Publish(chunk, held.version, held.clocks)] if self.is_primary(chunk) else []

    # ---- replication ---------------------------------------------------------------------------------------------------

    def _replicate(self, chunk: ChunkId, again: bool = False) -> list[Send]:
        """4. The sum goes to all who must hold it, and to a learner behind its refill, so that it keeps up; what is sent again
        brings the records of the step before with it."""
        assert self.plan is not None
        held = self.chunks[chunk]
        if held.closed is None or not self.is_primary(chunk):
            return []
        is_compared = (chunk + held.version) % COMPARED_EVERY_STEPS == 0
        message = Replicate(held.closed, self.book.before(held.version) if again else (), is_compared)
        learner = self.plan.placements[chunk].learner if chunk in self._filling.under_way else None
        receivers = dict.fromkeys([*self.backups(chunk), *([learner] if learner else [])])
        return [self._send(to, message) for to in receivers if to not in held.acks]

    def _fill(self) -> list[Effect]:
        """A chunk is sent while its step is open, for its sum is no state and would be a third more."""
        return [self._refill(chunk) for chunk in self._filling.send(lambda chunk: self.chunks[chunk].closed is None)]

    def _refill(self, chunk: ChunkId) -> Effect:
        assert self.plan is not None
        held, learner = self.chunks[chunk], self.plan.placements[chunk].learner
        assert learner is not None
        return self._send(learner, Refill(chunk, held.version, held.closed, self.book.before(held.version), clocks=held.clocks))

    def _on_replicate(self, sender: Incarnation, message: Replicate) -> list[Effect]:
        """5. The same epoch only. Applies the step before to every chunk held, then keeps the sum and acknowledges it."""
        assert self.plan is not None
        chunk, step = message.record.chunk, message.record.step
        if self.plan.placements[chunk].primary != sender or self.me not in self.plan.placements[chunk].holders:
            raise StaleError(f"{sender} is not primary of chunk {chunk} for {self.me} in plan {self.plan.number}")
        effects = self._learn(message.previous)
        held = self.chunks.get(chunk)
        if held is None:
            return effects
        if held.version < int(step):
            held.early = sender
            return effects + self._tell_position(chunk)  # not there yet: no ack; the primary asks again
        if held.version == int(step) and held.closed != message.record:
            held.closed = message.record  # replaces any sum that was not decided on
            held.begin()
            effects += [DropSums(chunk, keep_closed=False), KeepSum(chunk)]
        if held.version == int(step) and message.parameters_digest:
            return [*effects, Compare(chunk, sender, message.parameters_digest)]
        return effects + self._acknowledge(chunk, step, sender)

    def _acknowledge(self, chunk: ChunkId, step: Step, to: Incarnation) -> list[Effect]:
        return [self._send(to, Ack(step, (chunk,))), *self._tell_position(chunk), *self._settle([chunk])]

    def on_compared(self, chunk: ChunkId, sender: Incarnation, *, is_equal: bool) -> list[Effect]:
        """Invariant 6: copies are the same, bit for bit. One that is not is dropped, and filled again by a later plan."""
        held = self.chunks[chunk]
        if is_equal:
            return self._acknowledge(chunk, Step(held.version), sender)
        del self.chunks[chunk]
        self.diverged.add(chunk)
        text = (
            f"the copy of chunk {chunk} here differs from the primary's at version {held.version}; it is dropped and filled again"
        )
        return [Alarm(text), Forget(chunk)]

    def _on_ack(self, sender: Incarnation, message: Ack) -> list[Effect]:
        """6. Acks of the present epoch close their chunks."""
        touched = []
        for chunk in filter(self.is_primary, message.chunks):
            held = self.chunks[chunk]
            if held.version == int(message.step) and held.closed is not None:
                held.acks.add(sender)
                touched.append(chunk)
        return self._settle(touched)

    def _on_refill(self, sender: Incarnation, message: Refill) -> list[Effect]:
        """11. Only a learner takes it, from the primary, and only what is ahead of what it holds."""
        assert self.plan is not None
        chunk, placement = message.chunk, self.plan.placements[message.chunk]
        if (placement.primary, placement.learner) != (sender, self.me):
            return []
        held = self.chunks.get(chunk)
        effects: list[Effect] = []
        if held is None or (held.version, held.closed is not None) < (message.version, message.closed is not None):
            self.chunks[chunk] = self._terms.hold(chunk, message.version, message.clocks, message.closed)
            effects.append(KeepState(chunk, message.version, message.closed is not None, message.clocks))
        return effects + self._learn(message.previous, [chunk]) + self._tell_position(chunk)

    def _tell_position(self, chunk: ChunkId) -> list[Effect]:
        """11. A learner says where it stands, after every change."""
        assert self.plan is not None
        placement = self.plan.placements[chunk]
        held = self.chunks.get(chunk)
        if placement.learner != self.me or held is None:
            return []
        return [self._send(placement.primary, Position(chunk, held.version, held.closed is not None))]

    def _on_position(self, sender: Incarnation, message: Position) -> list[Effect]:
        """12. A learner that stands where the primary stands is waited for from now on, and only then asked to be listed."""
        assert self.plan is not None
        held = self.chunks.get(message.chunk)
        if held is None or not self.is_primary(message.chunk):
            return []
        if sender in self.plan.placements[message.chunk].in_sync:
            return [each for each in self._replicate(message.chunk) if each.to == sender and message.version == held.version]
        if self.plan.placements[message.chunk].learner != sender:
            return []
        if (held.version, held.closed is not None) == (message.version, message.closed):
            self._filling.done(message.chunk)
            asks = [] if sender in held.awaited else [AskInSync(self.plan.number, message.chunk, sender)]
            held.awaited.add(sender)
            if held.closed is not None:
                held.acks.add(sender)
            return [*asks, *self._settle([message.chunk]), *self._fill()]
        if message.version + 1 < held.version:
            self._filling.again(message.chunk)  # else it only lags: the sum that it lacks is on its way
        return self._fill()

    # ---- commit --------------------------------------------------------------------------------------------------------

    def _learn(self, records: Iterable[Record], touched: Collection[ChunkId] = ()) -> list[Effect]:
        """Takes in records; each is true for ever within the timeline, whoever repeats it."""
        for record in records:
            if record.step in self.book.records or record.step >= self.version - 1:
                self.book.learn(record)
        return self._settle(touched)

    def _settle(self, touched: Collection[ChunkId]) -> list[Effect]:
        """6 to 8. Reports what has closed of the chunks that an event has touched, and applies what has been decided: to them,
        or to all where the event brought the decision. So an event costs the same however many chunks there are."""
        effects = self._report_closed(touched)
        news, self.book.news = self.book.news, set()
        if self.book.begun:
            begun, self.book.begun = self.book.begun, set()
            effects += [each for chunk, held in self.chunks.items() if Step(held.version) in begun for each in self._close(chunk)]
        for step in sorted({*news, *(Step(self.chunks[chunk].version) for chunk in touched if chunk in self.chunks)}):
            effects += self._apply_decided(step, self.chunks if step in news else touched)
        return effects

    def _report_closed(self, touched: Collection[ChunkId]) -> list[Effect]:
        """6. Nobody is told anything about a chunk that its in-sync backups do not hold."""
        fresh = []
        for chunk in filter(self.is_primary, touched):
            closed, acks = self.chunks[chunk].closed, self.chunks[chunk].acks
            if closed is not None and acks.issuperset(self.backups(chunk)) and self.book.learn(closed):
                fresh.append(closed)
        return self._send_records(fresh) if fresh else []

    def _send_records(self, records: Sequence[Record] | None = None) -> list[Effect]:
        """To every other shard of the plan: `records`, or all that are kept and not known to be there (9)."""
        assert self.plan is not None
        effects: list[Effect] = []
        for shard in self.plan.shards:
            news = self.book.unknown_to(shard, records)
            if shard != self.me and news:
                effects.append(self._send(shard, Records(news)))
        return effects

    def _apply_decided(self, step: Step, chunks: Collection[ChunkId]) -> list[Effect]:
        """8. Every one of `chunks` moves on, if the step is decided and its sum is the one that was decided on."""
        decision = self.book.decision(step)
        if decision is None:
            return []
        effects: list[Effect] = []
        applied = []
        for chunk in sorted(chunks, key=lambda chunk: not self.is_primary(chunk)):  # pulls wait for those; nobody for a backup's
            held = self.chunks.get(chunk)
            if held is None or held.version != int(step) or held.closed is None:
                continue
            if held.closed.digest != self.book.of(step)[chunk].digest:
                held.closed = None  # a deposed primary's own sum: another one was decided on
                held.begin()
                effects.append(DropSums(chunk, keep_closed=False))
                continue
            applied.append(chunk)
            effects += self._apply(chunk, held, decision)
        effects += self._after_apply(step, decision, applied)
        return effects + [each for chunk in applied for each in self._close(chunk)]  # its lanes were all ahead

    def _apply(self, chunk: ChunkId, held: HeldChunk, decision: Decision) -> list[Effect]:
        step = Step(held.version)
        scale = None if decision.skipped or decision.refused else decision.scale
        held.advance(refused=decision.refused)
        effects: list[Effect] = [
            Apply(chunk, step, scale, decision.learning_rate, self._terms.lane(decision), held.clocks),
            *self._publish(chunk),
        ]
        asks, held.early = held.early, None
        effects += [self._send(asks, Position(chunk, held.version, closed=False))] if asks else []
        return effects + self._tell_position(chunk)

    def _after_apply(self, step: Step, decision: Decision, applied: list[ChunkId]) -> list[Effect]:
        if not applied:
            return []
        version = Version(step + 1)
        effects: list[Effect] = [Announce(step, decision)]
        primaries = tuple(chunk for chunk in applied if self.is_primary(chunk))
        if decision.checkpoint and primaries:
            effects.append(Checkpoint(version, primaries))
        if decision.checkpoint:
            self.requests = 0
        if decision.stop:
            self.end_version = version
        self.book.forget_before(self.version - 1)
        return effects + self._fill()

    def _send(self, to: Incarnation, message: Message) -> Send:
        assert self.plan is not None
        return Send(to, Envelope(self.me, self.plan.number, self.plan.timeline.id, message))
