"""Outboxes to the other shards: one thread and one connection each. A failed delivery is over; the core sends it again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
from torch import Tensor

from ps_service import envelopes
from ps_service.core.messages import Envelope
from shardlane import rpc, wire
from shardlane.ids import Incarnation, RunId
from shardlane.pb import coordinator_pb2, ps_pb2

SERVICE = ps_pb2.DESCRIPTOR.services_by_name["ParameterShard"]
RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message and the fp32 tensors that go along, pinned for it."""

    envelope: Envelope
    tensors: Sequence[Tensor] = ()
    unpin: Callable[[], None] | None = None  # to be called under the shard's lock once they are not needed any more


class Outbox:
    """Delivers parcels to one incarnation in order, many in one call."""

    def __init__(
        self,
        receiver: Incarnation,
        address: str,
        run_id: RunId,
        *,
        on_done: Callable[[Incarnation, list[Parcel], bool], None],
        on_plan: Callable[[coordinator_pb2.Plan], None],
    ) -> None:
        """`on_done` gets every parcel once, with whether the receiver has processed it: as far as is known here."""
        self.receiver = receiver
        self._run_id = run_id
        self._on_done, self._on_plan = on_done, on_plan
        self._waiting: deque[Parcel] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._channel = rpc.connect(address)
        self._client = rpc.Client(self._channel, SERVICE)
        self._thread = threading.Thread(target=self._run, name=f"to-{receiver}", daemon=True)
        self._thread.start()

    def put(self, parcel: Parcel) -> None:
        with self._changed:
            if not self._closed:
                self._waiting.append(parcel)
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._channel.close()

    def _run(self) -> None:
        while (parcels := self._next()) is not None:
            try:
                answer = self._client.Deliver(self._pieces(parcels), timeout=rpc.WAIT_SECONDS)
            except (grpc.RpcError, ValueError):  # ValueError: the channel was closed under the call
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)
                self._on_done(self.receiver, parcels, False)
            else:
                if answer.HasField("plan"):
                    self._on_plan(answer.plan)
                self._on_done(self.receiver, parcels, True)
        self._on_done(self.receiver, list(self._waiting), False)

    def _next(self) -> list[Parcel] | None:
        """All that waits, as soon as there is something; None: the outbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            parcels = list(self._waiting)
            self._waiting.clear()
            return parcels

    def _pieces(self, parcels: list[Parcel]) -> Iterator[wire.Framed[ps_pb2.DeliverRequest]]:
        for parcel in parcels:
            yield from envelopes.to_wire(parcel.envelope, parcel.tensors, run_id=self._run_id, receiver=self.receiver)
