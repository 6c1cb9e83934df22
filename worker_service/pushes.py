"""Gradient sums on their way to the shards, while the backward pass that makes the next ones goes on.

What is not sent yet has a byte budget; a full queue blocks the backward pass. Every sum is kept until its step is known to be
closed, since an answer promises nothing durable: whatever a shard may have lost is sent again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from shardlane import rpc, wire
from shardlane.chunks import byte_view, dtype_to_wire
from shardlane.errors import MalformedError
from shardlane.ids import ChunkId, Incarnation, PlanNumber, SiteIndex, Version
from shardlane.pb import ps_pb2, tensor_pb2
from shardlane.plan import Plan
from shardlane.turns import is_before
from worker_service.attempt import Attempt
from worker_service.core.events import Key, Outcome, Refusal
from worker_service.pulls import RETRY_SECONDS, ClientOf
from worker_service.staging import HostTensor, Staging

CALL_SECONDS = 4 * rpc.WAIT_SECONDS  # only a peer that is stuck reaches it
LINGER_SECONDS = 0.05  # a stream without work ends: it holds a thread of its shard, and others wait for one

_OUTCOMES: dict[int, Outcome] = {
    ps_pb2.PUSH_OUTCOME_OVERLAPS: "overlaps",
    ps_pb2.PUSH_OUTCOME_NOT_YET: "not_yet",
    ps_pb2.PUSH_OUTCOME_NOT_OWNER: "not_owner",
    ps_pb2.PUSH_OUTCOME_STALE: "stale",
}


@dataclass(slots=True)
class Contribution:
    """A block's sum of one chunk at one site: elements `offset … offset + num_elements - 1` of `host`, encoded or not."""

    key: Key
    tokens: int
    loss: float
    host: HostTensor
    offset: int
    num_elements: int
    codec: int = ps_pb2.CODEC_UNSPECIFIED

    @property
    def num_bytes(self) -> int:
        return self.host.values.element_size() * self.num_elements


@dataclass(slots=True)
class _Queue:
    """What waits for one shard."""

    waiting: dict[Key, None] = field(default_factory=dict)  # in order
    call: Any = None
    closed: bool = False  # the shard is gone


class Pusher:
    """Pushes one stage's sums."""

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        client_of: ClientOf,
        *,
        num_lanes: int,
        num_places: int = 1,
        budget_bytes: int,
        offer: Callable[[Plan], None],
        on_answers: Callable[[tuple[Refusal, ...]], None],
        on_fault: Callable[[str], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._plan, self._staging, self._client_of = plan, staging, client_of
        self._num_lanes, self._num_places, self._budget_bytes = num_lanes, num_places, budget_bytes
        self._offer, self._on_answers, self._on_fault, self._on_bytes = offer, on_answers, on_fault, on_bytes
        self._changed = threading.Condition()
        self._kept: dict[Key, Contribution] = {}
        self._unsent_bytes = 0  # of contributions that were never begun
        self._fresh: set[Key] = set()  # the same contributions
        self._queues: dict[Incarnation, _Queue] = {}
        self._closed = False
        self._open_queues()

    def _open_queues(self) -> None:
        for shard in self._plan.shards:
            if shard not in self._queues:
                self._queues[shard] = _Queue()
                threading.Thread(target=self._run, args=(shard,), name=f"push-{shard}", daemon=True).start()

    def reroute(self, plan: Plan) -> None:
        """Whatever is kept of chunks that have another primary now goes there, sent before or not; and if a plan was missed, by
        which they had another one for a while, everything.
        """
        with self._changed:
            before = self._plan.number
            is_next = plan.number == PlanNumber(before.term, before.epoch + 1)
            moved = dict.fromkeys(
                key for key in self._kept if not is_next or plan.placements[key.chunk].primary != self._primary(key)
            )
            gone = [self._queues.pop(shard) for shard in list(self._queues) if shard not in plan.shards]
            for queue in (*gone, *self._queues.values()):
                queue.waiting = {key: None for key in queue.waiting if key not in moved}
            for queue in gone:
                queue.closed = True
            self._plan = plan
            self._open_queues()
            for key in moved:
                self._enqueue(key)
            calls = [queue.call for queue in gone if queue.call is not None]
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    @property
    def num_bytes(self) -> int:
        """Not sent yet."""
        return self._unsent_bytes

    def begin(self, version: Version) -> None:
        """`version` is published: sums of earlier steps, under ASP of the same lane, are not needed any more."""
        with self._changed:
            self._forget(version)

    def put(self, contribution: Contribution, attempt: Attempt) -> None:
        """Blocks while the queue is full. Raises `Abandoned`."""
        with self._changed:
            attempt.wait(
                self._changed,
                lambda: self._unsent_bytes == 0 or self._unsent_bytes + contribution.num_bytes <= self._budget_bytes,
            )
            if self._closed or contribution.key in self._fresh:
                return
            self._kept[contribution.key] = contribution
            self._fresh.add(contribution.key)
            self._unsent_bytes += contribution.num_bytes
            self._enqueue(contribution.key)

    def again(self, keys: tuple[Key, ...]) -> None:
        """Sends these once more, those that are still kept and do not wait already."""
        with self._changed:
            for key in keys:
                if key in self._kept:
                    self._enqueue(key)

    def all_again(self, shard: Incarnation) -> None:
        with self._changed:
            for key in self._kept:
                if self._primary(key) == shard:
                    self._enqueue(key)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._forget(None)
            calls = [queue.call for queue in self._queues.values() if queue.call is not None]
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    def _primary(self, key: Key) -> Incarnation:
        return self._plan.placements[key.chunk].primary

    def _enqueue(self, key: Key) -> None:
        self._queues[self._primary(key)].waiting[key] = None
        self._changed.notify_all()

    def _forget(self, before: Version | None) -> None:
        """The sums of steps below `before`; None: all."""
        gone = {key: each for key, each in self._kept.items() if before is None or is_before(key.step, before, self._num_places)}
        for queue in self._queues.values():
            queue.waiting = {key: None for key in queue.waiting if key not in gone}
        for host in {id(each.host): each.host for each in gone.values()}.values():
            self._staging.release(host)
        self._unsent_bytes -= sum(each.num_bytes for key, each in gone.items() if key in self._fresh)
        self._fresh.difference_update(gone)
        for key in gone:
            del self._kept[key]
        self._changed.notify_all()

    # ---- one thread and one stream at a time a shard -------------------------------------------------------------------

    def _run(self, shard: Incarnation) -> None:
        queue, refused = self._queues[shard], False

        def is_closed() -> bool:
            return self._closed or queue.closed

        while True:
            with self._changed:
                # A refusal is asked about again soon, but not at once; a failed stream has left its work in the queue.
                self._changed.wait_for(is_closed, RETRY_SECONDS if refused else 0)
                self._changed.wait_for(lambda: is_closed() or bool(queue.waiting))
                if is_closed():
                    return
            sent: list[Key] = []
            try:
                call = self._client_of(shard).Push.future(self._pieces(queue, sent), timeout=CALL_SECONDS)
                with self._changed:
                    queue.call = call
                refusals = self._read(call.result())
            except (grpc.RpcError, grpc.FutureCancelledError, ValueError, MalformedError) as error:
                if isinstance(error, MalformedError) or _is_refusal(error):
                    self._on_fault(f"{shard}: {error}")
                with self._changed:
                    unsure = [key for key in sent if key in self._kept and self._primary(key) == shard]
                    queue.waiting = {**dict.fromkeys(unsure), **queue.waiting}
                refused = True
                continue
            refused = bool(refusals)
            if refusals:
                self._on_answers(refusals)

    def _pieces(self, queue: _Queue, sent: list[Key]) -> Iterator[wire.Framed[ps_pb2.PushRequest]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over(queue) or bool(queue.waiting), LINGER_SECONDS)
                if self._is_over(queue) or not queue.waiting:
                    return
                key = next(iter(queue.waiting))
                del queue.waiting[key]
                contribution = self._kept[key]
                sent.append(key)
            yield from self._contribution_pieces(contribution)
            self._on_bytes(contribution.num_bytes)
            with self._changed:
                if key in self._fresh:
                    self._fresh.discard(key)
                    self._unsent_bytes -= contribution.num_bytes
                    self._changed.notify_all()

    def _is_over(self, queue: _Queue) -> bool:
        return self._closed or queue.closed

    def _contribution_pieces(self, contribution: Contribution) -> Iterator[wire.Framed[ps_pb2.PushRequest]]:
        host, key = contribution.host, contribution.key
        if host.wait is not None:
            host.wait()
        header = ps_pb2.PushRequest(
            run_id=self._plan.run_id,
            timeline=self._plan.timeline.id,
            step=key.step,
            block=wire.block_to_wire(key.block),
            site=key.site,
            chunk=key.chunk,
            tokens=contribution.tokens,
            loss=contribution.loss,
            codec=ps_pb2.Codec.Name(contribution.codec),
        )
        dtype = tensor_pb2.DType.Name(dtype_to_wire(host.values.dtype))
        view = byte_view(host.values.narrow(0, contribution.offset, contribution.num_elements))
        for start, end in wire.payload_ranges(len(view)):
            header.slice.CopyFrom(tensor_pb2.Slice(dtype=dtype, offset=start, total=len(view)))
            yield wire.Framed(header, view[start:end])

    def _read(self, response: ps_pb2.PushResponse) -> tuple[Refusal, ...]:
        """Raises `MalformedError`."""
        if response.HasField("plan"):
            self._offer(wire.plan_from_wire(response.plan))
        return tuple(
            Refusal(
                Key(
                    Version(each.step),
                    ChunkId(each.chunk),
                    SiteIndex(each.site),
                    wire.block_from_wire(each.block, self._num_lanes),
                ),
                _OUTCOMES.get(each.outcome, "stale"),
                tuple(wire.block_from_wire(block, self._num_lanes) for block in each.missing),
            )
            for each in response.refused
        )


def _is_refusal(error: Exception) -> bool:
    """Whether the shard found fault with what was sent: a bug, or a plan that is past."""
    return isinstance(error, grpc.RpcError) and error.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNKNOWN,
    )
