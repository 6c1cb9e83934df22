"""Outboxes to the other shards: a connection and two threads each. A failed delivery is over; the core sends it again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import grpc
from torch import Tensor

from ps_service import envelopes
from ps_service.core.messages import Envelope
from shardlane import rpc, wire
from shardlane.ids import Incarnation, RunId
from shardlane.pb import coordinator_pb2, ps_pb2

SERVICE = ps_pb2.DESCRIPTOR.services_by_name["ParameterShard"]
CALLERS = {"Push": ("worker",), "Pull": ("worker",), "Deliver": ("shard",)}
RETRY_SECONDS = 0.2
LINGER_SECONDS = 0.05  # that a call waits for more; its messages are on their way meanwhile, only its answer is not
CALL_SECONDS_MAX = 5.0  # then its answer is wanted, however much there is


Outcome = Literal["delivered", "lost", "lost with tensors", "dropped"]


@dataclass(slots=True)
class Parcel:
    """A message and the fp32 tensors that go along, pinned for it."""

    envelope: Envelope
    tensors: Sequence[Tensor] = ()
    unpin: Callable[[], None] | None = None  # under the shard's lock, once

    def release(self) -> None:
        """The tensors are not needed any more. Called under the shard's lock."""
        unpin, self.unpin = self.unpin, None
        if unpin is not None:
            unpin()


@dataclass(slots=True)
class _Lane:
    """Parcels that go in order. `call`: what the call under way has taken; one that is over takes no more."""

    waiting: deque[Parcel] = field(default_factory=deque)
    call: list[Parcel] | None = None


class Outbox:
    """Delivers parcels to one incarnation, many in one call. Those with tensors go in order, and so do those without; but an
    acknowledgement never waits behind megabytes of sums.
    """

    def __init__(
        self,
        receiver: Incarnation,
        address: str,
        run_id: RunId,
        *,
        on_sent: Callable[[Parcel], None],
        on_done: Callable[[Incarnation, list[Parcel], Outcome], None],
        on_plan: Callable[[coordinator_pb2.Plan], None],
        network: rpc.Network = rpc.PLAIN,
    ) -> None:
        """`on_sent` gets a parcel whose tensors have been copied out. `on_done` gets every parcel once, with what became of it as
        far as is known here; several that say one thing as one.
        """
        self.receiver = receiver
        self._run_id = run_id
        self._on_sent, self._on_done, self._on_plan = on_sent, on_done, on_plan
        self._light, self._heavy = _Lane(), _Lane()
        self._changed = threading.Condition()
        self._closed = False
        self._channel = network.connect(address, to="shard")
        self._client = rpc.Client(self._channel, SERVICE)
        for name, lane in (("light", self._light), ("heavy", self._heavy)):
            threading.Thread(target=self._run, args=(lane,), name=f"{name}-to-{receiver}", daemon=True).start()

    def put(self, parcel: Parcel) -> None:
        with self._changed:
            if not self._closed:
                (self._heavy if parcel.tensors else self._light).waiting.append(parcel)
                self._changed.notify_all()

    @property
    def num_bytes(self) -> int:
        """Of tensors that wait."""
        with self._changed:
            return sum(tensor.nbytes for parcel in self._heavy.waiting for tensor in parcel.tensors)

    def drop(self) -> None:
        """Nothing that waits need be sent any more: it is of a plan that is past. Called under the shard's lock."""
        with self._changed:
            for lane in (self._light, self._heavy):
                for parcel in lane.waiting:
                    parcel.release()
                lane.waiting.clear()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._channel.close()

    def _run(self, lane: _Lane) -> None:
        while self._begin(lane):
            assert lane.call is not None
            outcome: Outcome = "delivered"
            try:
                answer = self._client.Deliver(self._pieces(lane, lane.call), timeout=rpc.WAIT_SECONDS)
            except (grpc.RpcError, ValueError):  # ValueError: the channel was closed under the call
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)
                outcome = "lost with tensors" if lane is self._heavy else "lost"
            else:
                if answer.HasField("plan"):
                    self._on_plan(answer.plan)
            self._on_done(self.receiver, self._end(lane, outcome), outcome)
        self._on_done(self.receiver, list(lane.waiting), "dropped")

    def _begin(self, lane: _Lane) -> bool:
        """Waits for the first parcel of a call; False: the outbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: lane.waiting or self._closed)
            lane.call = []
            return not self._closed

    def _end(self, lane: _Lane, outcome: Outcome) -> list[Parcel]:
        """What was taken; and what waits behind tensors that are lost, for all of them are sent again: did they stay, every
        failure would add to them.
        """
        with self._changed:
            assert lane.call is not None
            taken, lane.call = lane.call, None
            if outcome == "lost with tensors":
                taken += lane.waiting
                lane.waiting.clear()
            return taken

    def _pieces(self, lane: _Lane, call: list[Parcel]) -> Iterator[wire.Framed[ps_pb2.DeliverRequest]]:
        """The messages of what waits, and of what comes soon after: a call costs more than the message of a small chunk."""
        deadline = time.monotonic() + CALL_SECONDS_MAX
        while time.monotonic() < deadline and (parcels := self._take(lane, call)):
            for parcel in parcels:
                yield from envelopes.to_wire(parcel.envelope, parcel.tensors, run_id=self._run_id, receiver=self.receiver)
                if parcel.tensors:
                    self._on_sent(parcel)

    def _take(self, lane: _Lane, call: list[Parcel]) -> list[Parcel]:
        """The next parcel with tensors, or all that wait without; none: nothing came, or the call is over."""
        with self._changed:
            self._changed.wait_for(lambda: lane.waiting or self._closed, LINGER_SECONDS)
            if lane.call is not call or self._closed or not lane.waiting:
                return []
            if lane is self._heavy:
                taken = [lane.waiting.popleft()]
            else:
                taken = [Parcel(envelope) for envelope in envelopes.merged(parcel.envelope for parcel in lane.waiting)]
                lane.waiting.clear()
            call += taken
            return taken
