"""A worker's sums on their way to the shards, kept until the next version is seen, as `worker_service/pushes.py` does it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ps_service.core import messages
from ps_service.core.messages import Outcome
from shardlane.ids import Incarnation, PlanNumber, Step, Version
from shardlane.plan import Plan
from shardlane.turns import is_before
from tests.sim.network import RefusedError
from tests.sim.shard import Batch
from tests.sim.sketch import block_text
from worker_service.core.events import Key, Refusal

if TYPE_CHECKING:
    from tests.sim.worker import WorkerProcess

RETRY_SECONDS = 0.1
BATCH_SECONDS = 0.0005  # what comes at one time goes in one stream
_REFUSALS = (Outcome.OVERLAPS, Outcome.NOT_YET, Outcome.NOT_OWNER, Outcome.STALE)


@dataclass
class Queue:
    """What waits for one shard."""

    waiting: dict[Key, None] = field(default_factory=dict)
    is_busy: bool = False
    closed: bool = False


class Pusher:
    def __init__(self, worker: WorkerProcess, plan: Plan) -> None:
        self._worker, self._plan = worker, plan
        self._kept: dict[Key, tuple[int, str]] = {}  # tokens and the sum
        self._fresh: set[Key] = set()  # not sent yet
        self._queues: dict[Incarnation, Queue] = {shard: Queue() for shard in plan.shards}
        self._closed = False

    def reroute(self, plan: Plan) -> None:
        before = self._plan.number
        is_next = plan.number == PlanNumber(before.term, before.epoch + 1)
        moved = [key for key in self._kept if not is_next or plan.placements[key.chunk].primary != self._primary(key)]
        gone = [self._queues.pop(shard) for shard in list(self._queues) if shard not in plan.shards]
        for queue in (*gone, *self._queues.values()):
            queue.waiting = {key: None for key in queue.waiting if key not in moved}
        for queue in gone:
            queue.closed = True
        self._plan = plan
        for shard in plan.shards:
            self._queues.setdefault(shard, Queue())
        for key in moved:
            self._enqueue(key)

    def begin(self, version: Version) -> None:
        num_places = self._worker.world.config.train.num_places
        self._forget([key for key in self._kept if is_before(key.step, version, num_places)])

    def close(self) -> None:
        self._closed = True
        self._forget(list(self._kept))

    def put(self, key: Key) -> None:
        if self._closed or key in self._fresh:
            return
        self._kept[key] = key.block.size, block_text(key.step, self._plan.timeline.id, key.block)
        self._fresh.add(key)
        self._enqueue(key)

    def again(self, keys: tuple[Key, ...]) -> None:
        for key in keys:
            if key in self._kept:
                self._enqueue(key)

    def all_again(self, shard: Incarnation) -> None:
        self.again(tuple(key for key in self._kept if self._primary(key) == shard))

    def _primary(self, key: Key) -> Incarnation:
        return self._plan.placements[key.chunk].primary

    def _forget(self, keys: list[Key]) -> None:
        for key in keys:
            del self._kept[key]
            self._fresh.discard(key)
            for queue in self._queues.values():
                queue.waiting.pop(key, None)

    def _enqueue(self, key: Key) -> None:
        shard = self._primary(key)
        self._queues[shard].waiting[key] = None
        self._stream_soon(shard, self._queues[shard], BATCH_SECONDS)

    # ---- one stream at a time a shard ----------------------------------------------------------------------------------

    def _stream_soon(self, shard: Incarnation, queue: Queue, seconds: float) -> None:
        if not queue.is_busy:
            queue.is_busy = True
            self._worker.clock.after(seconds, self._worker, lambda: self._stream(shard, queue))

    def _stream(self, shard: Incarnation, queue: Queue) -> None:
        queue.is_busy = False
        if self._closed or queue.closed or not queue.waiting:
            return
        queue.is_busy = True
        worker, sent = self._worker, list(queue.waiting)
        timeline = self._plan.timeline.id
        queue.waiting.clear()
        self._fresh.difference_update(sent)
        batch = [
            (messages.Contribution(timeline, Step(key.step), key.block, key.site, key.chunk, tokens, float(tokens)), text)
            for key in sent
            for tokens, text in (self._kept[key],)
        ]
        process = worker.world.shards.get(shard)

        def on_reply(reply: Batch) -> None:
            queue.is_busy = False
            if self._closed:
                return
            if reply.plan is not None:
                worker.offer(reply.plan)
            refusals = tuple(
                Refusal(key, answer.outcome.value, answer.missing)  # type: ignore[arg-type]
                for key, answer in zip(sent, reply.answers, strict=True)
                if answer.outcome in _REFUSALS
            )
            self._stream_soon(shard, queue, RETRY_SECONDS if refusals else 0.0)
            if refusals:
                worker.on_answers(refusals)

        def on_failure(_: RefusedError | None) -> None:
            queue.is_busy = False
            if not self._closed:
                unsure = [key for key in sent if key in self._kept and self._primary(key) == shard]
                queue.waiting = {**dict.fromkeys(unsure), **queue.waiting}
            self._stream_soon(shard, queue, RETRY_SECONDS)

        worker.network.call(worker, process, lambda: process.push(batch) if process is not None else None, on_reply, on_failure)
