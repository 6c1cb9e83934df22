"""The shell around the core: takes the lock, feeds one event, does what the core says."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile

from torch import Tensor

from ps_service.core.commit import decide
from ps_service.core.holdings import Terms
from ps_service.core.messages import (  # fmt: skip
    Ack,
    Alarm,
    Announce,
    Answer,
    Apply,
    AskInSync,
    Checkpoint,
    Close,
    Compare,
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
    Publish,
    Record,
    Refill,
    Replicate,
    Send,
)  # isort: skip
from ps_service.core.shard import ShardCore
from ps_service.core.waiting import waits_for
from ps_service.instruments import ShardInstruments
from ps_service.peers import Outbox, Outcome, Parcel
from ps_service.publication import Publications
from ps_service.snapshots import SnapshotWriter
from ps_service.store import TensorStore
from shardlane import rpc, wire
from shardlane.checkpoint import CheckpointReader
from shardlane.config import Config
from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Step, Timeline
from shardlane.initialise import initial_chunk
from shardlane.logs import logger
from shardlane.manifest import PARAMETER, checkpoint_folder
from shardlane.partition import Layout
from shardlane.pb import coordinator_pb2
from shardlane.plan import Plan
from shardlane.storage import Location

APPLY_THREADS_MAX = 4  # each updates one chunk at a time
LOOK_SECONDS = 0.1  # that a heartbeat waits for the lock before it looks whether a checkpoint is being read
SUMMARIES_MAX = 4096  # decided steps kept while the coordinator is away; the oldest are lost to metrics.jsonl beyond that

Copies = tuple[PlanNumber | None, list[tuple[ChunkId, Incarnation]], list[ChunkId]]


class Shard:
    """One parameter shard without its sockets. Every public method may be called from any thread."""

    def __init__(
        self,
        me: Incarnation,
        config: Config,
        *,
        run_id: RunId,
        checkpoint_path: Location,
        instruments: ShardInstruments,
        report_checkpoint: Callable[[coordinator_pb2.ReportCheckpointRequest], None],
        on_plan: Callable[[coordinator_pb2.Plan], None],
        on_milestone: Callable[[], None],
        network: rpc.Network = rpc.PLAIN,
    ) -> None:
        """`on_plan` gets plans that peers attach to their answers; `on_milestone` hears that the next heartbeat has news."""
        self.me, self.config, self.run_id = me, config, run_id
        self.layout = Layout.of(config)
        self.store = TensorStore(config, self.layout)
        self.publications = Publications()
        self.instruments = instruments
        self.log = logger(role="shard", run=run_id, rank=me, step=lambda: self.publications.oldest())
        self._checkpoint_path = checkpoint_path
        self._snapshots = SnapshotWriter(me, checkpoint_path, config, self.store, report_checkpoint)
        self._on_plan, self._on_milestone, self._network = on_plan, on_milestone, network
        self._appliers = ThreadPoolExecutor(min(APPLY_THREADS_MAX, os.cpu_count() or 1), thread_name_prefix="apply")
        self._lock = threading.Lock()
        self._is_loading = False
        self._told_copies: Copies = (None, [], [])
        self._outboxes: dict[Incarnation, Outbox] = {}
        self._summaries: deque[coordinator_pb2.StepSummary] = deque(maxlen=SUMMARIES_MAX)
        self._terms = Terms.of(config, self.layout)
        self._core = ShardCore(me, self._terms, decide=self._decide)
        instruments.watch(self)

    @property
    def plan(self) -> Plan | None:
        return self._core.plan

    def serving(self) -> tuple[Plan | None, int]:
        """The plan whose versions are published at this moment, and their generation; never one that is half taken up."""
        with self._lock:
            return self._core.plan, self.publications.generation

    def _decide(self, step: Step, records: Sequence[Record]) -> Decision:
        return decide(step, records, config=self.config, loss_chunk=self.layout.loss_chunk)

    # ---- events --------------------------------------------------------------------------------------------------------

    def judge(self, contribution: Contribution) -> Answer:
        with self._lock:
            return self._core.judge(contribution)

    def push(self, contribution: Contribution, values: Tensor) -> Answer:
        """Counts a contribution. `values`: fp32 [num_elements] from `store.pool`, taken over in any case."""
        with self._lock:
            answer, effects = self._core.on_push(contribution)
            if not effects:
                self.store.pool.give(values)
            self._do(effects, values=(values,))
        return answer

    def adopt(self, plan: Plan) -> None:
        """Raises `StaleError` if it contradicts the plan here."""
        with self._lock:
            before = self._core.plan
            effects = self._core.on_plan(plan)
            if self._core.plan is before:
                return
            self.log.info("plan adopted", epoch=str(plan.number), reason=plan.reason)
            if before is not None and before.timeline != plan.timeline:
                self._summaries.clear()  # they are of steps that are void now
            self.publications.fail_waiting()
            self._set_outboxes(plan)
            for chunk in range(len(plan.placements)):
                if plan.placements[chunk].primary != self.me:
                    self.publications.withdraw(ChunkId(chunk))
            self._do(effects)

    def deliver(self, envelope: Envelope, values: Sequence[Tensor]) -> None:
        """A message of another shard. `values`: what came along, from `store.pool`. Raises `StaleError`."""
        with self._lock:
            effects = self._core.on_message(envelope)
            if isinstance(envelope.message, Ack):
                self.instruments.acknowledged(envelope.message.chunks, envelope.message.step)
            self._do(effects, values=values, message=envelope.message)

    def tick(self) -> None:
        """Sends again what is not known to have arrived; called when nothing has moved for a while."""
        with self._lock:
            if self._core.plan is not None:
                self._do(self._core.on_tick())

    @property
    def num_outbox_bytes(self) -> int:
        """Of tensors that wait to be sent to other shards."""
        return sum(outbox.num_bytes for outbox in list(self._outboxes.values()))

    def waits_for(self) -> str:
        with self._lock:
            return waits_for(self._core)

    def close(self) -> None:
        self._appliers.shutdown()
        self._snapshots.close()
        for outbox in self._outboxes.values():
            outbox.close()

    def copies(self) -> Copies:
        """The plan here, the learners that have caught up in it, and the chunks whose copies here were found wrong."""
        with self._unless_loading() as is_held:
            if is_held and (plan := self._core.plan) is not None:
                self._told_copies = plan.number, self._core.caught_up(), sorted(self._core.diverged)
            return self._told_copies

    # ---- what the coordinator is told ----------------------------------------------------------------------------------

    def unacknowledged(self, num_max: int) -> list[coordinator_pb2.StepSummary]:
        with self._unless_loading() as is_held:
            return [self._summaries[i] for i in range(min(num_max, len(self._summaries)))] if is_held else []

    def hear(self, timeline: int, *, num_told: int, requests: int) -> None:
        """What the coordinator says of `timeline`: it has the summaries of all steps below `num_told`, and wants these REQUEST_*
        bits in the next record to close here. An answer from before a roll-back says nothing of the steps after it.
        """
        with self._unless_loading() as is_held:
            if not is_held or self._core.plan is None or timeline != self._core.plan.timeline.id:
                return
            while self._summaries and self._summaries[0].step < num_told:
                self._summaries.popleft()
            self._core.requests |= requests

    @contextmanager
    def _unless_loading(self) -> Iterator[bool]:
        """The lock, or not (False) while it is held to read a checkpoint, for as long as its store takes: heartbeats go on."""
        while not (is_held := self._lock.acquire(timeout=LOOK_SECONDS)) and not self._is_loading:
            pass
        try:
            yield is_held
        finally:
            if is_held:
                self._lock.release()

    # ---- peers ---------------------------------------------------------------------------------------------------------

    def _set_outboxes(self, plan: Plan) -> None:
        for gone in [each for each in self._outboxes if not plan.names(each)]:
            self._outboxes.pop(gone).close()
        for outbox in self._outboxes.values():
            outbox.drop()  # the core says it all again under the new plan; the old one would be refused, and with it what follows
        for peer in plan.shards:
            if peer != self.me and peer not in self._outboxes:
                self._outboxes[peer] = Outbox(
                    peer,
                    plan.addresses[peer],
                    self.run_id,
                    on_sent=self._on_sent,
                    on_done=self._on_done,
                    on_plan=self._on_plan,
                    network=self._network,
                )

    def _on_sent(self, parcel: Parcel) -> None:
        with self._lock:
            parcel.release()

    def _on_done(self, peer: Incarnation, parcels: list[Parcel], outcome: Outcome) -> None:
        """Only what goes the same way is sent again: sums that wait, or are under way, have not been lost with a record."""
        with self._lock:
            for parcel in parcels:
                parcel.release()
                if outcome == "delivered":
                    self._core.on_delivered(peer, parcel.envelope)
            if self._core.plan is not None and outcome in ("lost", "lost with tensors"):
                with_tensors = outcome == "lost with tensors"
                lost = self._core.on_lost(peer)
                self._do([each for each in lost if isinstance(each.envelope.message, Replicate | Refill) == with_tensors])

    # ---- effects -------------------------------------------------------------------------------------------------------

    def _do(self, effects: Sequence[Effect], *, values: Sequence[Tensor] = (), message: Message | None = None) -> None:
        """Does effects in order; a measured sum brings more. `values` belong to the event."""
        todo, applied = deque(effects), dict[Apply, Future[None]]()
        while todo:
            effect = todo.popleft()
            match effect:
                case Keep():
                    self.store.keep(effect, values[0])
                case Join():
                    self.store.join(effect)
                case Close():
                    square_norm, digest = self.store.close(effect)
                    self.instruments.closed(effect.chunk, Step(self._core.chunks[effect.chunk].version))
                    todo.extend(self._core.on_measured(effect.chunk, square_norm=square_norm, digest=digest))
                case KeepSum():
                    self.store.keep_sum(effect.chunk, values[0])
                case Compare(chunk, sender, digest):
                    is_equal = self.store.parameters_digest(chunk) == digest
                    self.instruments.digest_mismatches.inc(not is_equal)
                    todo.extend(self._core.on_compared(chunk, sender, is_equal=is_equal))
                case KeepState():
                    assert isinstance(message, Refill)
                    self._keep_state(effect, values, message.num_steps)
                case Apply():
                    if effect not in applied:
                        applied = self._begin_applying(effect, todo)
                    applied[effect].result()
                case Publish():
                    self.publications.publish(effect.chunk, effect.version, effect.clocks)
                    self.instruments.published(effect.chunk, effect.version)
                case DropSums():
                    self.store.drop_sums(effect.chunk, keep_closed=effect.keep_closed)
                case Forget():
                    self.publications.withdraw(effect.chunk)
                    self.store.forget(effect.chunk)
                case Load():
                    self._load(effect.timeline, effect.chunks)
                case Send():
                    self._send(effect)
                case Announce():
                    self._announce(effect)
                case Checkpoint():
                    assert self._core.plan is not None
                    self._snapshots.take(self._core.plan.timeline.id, effect.version, effect.chunks)
                    self._on_milestone()
                case AskInSync():
                    self._on_milestone()  # the heartbeat tells (`caught_up`)
                case Alarm():
                    self.instruments.alarms.inc()
                    self.log.error(effect.text)
                    self._on_milestone()

    def _begin_applying(self, first: Apply, following: Iterable[Effect]) -> dict[Apply, Future[None]]:
        """`first`, and the updates right behind it: they have nothing to do with one another, and each takes one thread."""
        behind = takewhile(lambda effect: isinstance(effect, Apply | Publish), following)
        updates = [first, *(effect for effect in behind if isinstance(effect, Apply))]
        return {update: self._appliers.submit(self._apply, update) for update in updates}

    def _apply(self, effect: Apply) -> None:
        with self.instruments.apply_seconds.time():
            self.store.apply(effect)

    def _load(self, timeline: Timeline, chunks: Sequence[ChunkId]) -> None:
        clocks = self._terms.clocks(timeline)
        if not timeline.digest:
            for chunk in chunks:
                self.store.put(chunk, timeline.version, {PARAMETER: self._initial(chunk)}, num_steps=0, clocks=clocks)
            return
        self._is_loading = True
        try:
            with CheckpointReader(checkpoint_folder(self._checkpoint_path, timeline.version)) as reader:
                if reader.manifest.digest != timeline.digest:
                    raise CheckpointError(f"{reader.folder} is another checkpoint than the one that the plan names")
                for chunk, tensors in reader.read_chunks(chunks):
                    self.store.put(chunk, timeline.version, tensors, reader.manifest.optimizer_step, clocks)
        finally:
            self._is_loading = False

    def _initial(self, chunk: ChunkId) -> Tensor:
        return initial_chunk(self.config, self.layout, self.layout.chunks[chunk])

    def _keep_state(self, effect: KeepState, values: Sequence[Tensor], num_steps: int) -> None:
        names = self.store.names
        tensors = dict(zip(names, values, strict=False))
        self.store.put(effect.chunk, effect.version, tensors, num_steps, effect.clocks)
        if effect.with_sum:
            self.store.keep_sum(effect.chunk, values[len(names)])

    def _send(self, effect: Send) -> None:
        outbox = self._outboxes.get(effect.to)
        if outbox is None:
            return
        match effect.envelope.message:
            case Replicate(record=record) as message:
                total = self.store.pin_sum(record.chunk)
                digest = self.store.parameters_digest(record.chunk) if message.is_compared else 0
                envelope = replace(effect.envelope, message=replace(message, parameters_digest=digest))
                outbox.put(Parcel(envelope, [total], unpin=lambda: self.store.unpin_sum(record.chunk, total)))
            case Refill() as message:
                outbox.put(self._pack_refill(effect.envelope, message))
            case _:
                outbox.put(Parcel(effect.envelope))

    def _pack_refill(self, envelope: Envelope, message: Refill) -> Parcel:
        chunk, image = message.chunk, self.store.pin_image(message.chunk)
        total = self.store.pin_sum(chunk) if message.closed is not None else None

        def unpin() -> None:
            self.store.unpin_image(chunk, image)
            if total is not None:
                self.store.unpin_sum(chunk, total)

        tensors = [*image.tensors.values(), *image.copies, *([] if total is None else [total])]
        return Parcel(replace(envelope, message=replace(message, num_steps=image.num_steps)), tensors, unpin)

    def _announce(self, effect: Announce) -> None:
        if self._summaries and self._summaries[-1].step >= effect.step:
            return  # chunks of one step may be applied one after another
        decision = effect.decision
        self.instruments.note(decision)
        if decision.skipped:
            self.log.warning("step skipped: its gradients are not finite", grad_norm=decision.grad_norm)
        self._summaries.append(
            coordinator_pb2.StepSummary(
                step=effect.step,
                loss=decision.loss,
                grad_norm=decision.grad_norm,
                learning_rate=decision.learning_rate,
                tokens=decision.tokens,
                skipped=decision.skipped,
                refused=decision.refused,
                requests=decision.requests,
                tally=wire.tally_to_wire(decision.tally),
            )
        )
