"""An outbox over loopback gRPC: what is done with what waits when a call is lost, or a plan is past."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from ps_service import envelopes
from ps_service.core.messages import Envelope, Record, Records, Replicate
from ps_service.peers import Outbox, Outcome, Parcel
from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Step
from shardlane.pb import ps_pb2, ps_pb2_grpc
from shardlane.tally import LaneRun, Tally

ME, PEER, RUN = Incarnation("shard-me"), Incarnation("shard-peer"), RunId("run")
ONCE = Tally(1, (LaneRun(0, 2, 1, 1),))


def record(chunk: int) -> Record:
    return Record(Step(0), ChunkId(chunk), 1.0, 8, 2.0, 7, ONCE)


class Peer(ps_pb2_grpc.ParameterShardServicer):
    """Reads one message of a call, waits until it is let go, and then refuses the call or takes in all of it."""

    def __init__(self) -> None:
        self.refuses = False
        self.may_answer = threading.Event()
        self.chunks: list[int] = []  # of sums that were taken in
        self.num_calls = 0

    def Deliver(self, pieces: Iterator[ps_pb2.DeliverRequest], context: grpc.ServicerContext) -> ps_pb2.DeliverResponse:
        self.num_calls += 1
        first = next(pieces)
        self.may_answer.wait(10)
        if self.refuses:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a message of another plan")
        for piece in (first, *pieces):
            if piece.HasField("replicate"):
                self.chunks.append(piece.replicate.record.chunk)
        return ps_pb2.DeliverResponse()


class Sending:
    """An outbox to a peer, and what it said of its parcels."""

    def __init__(self) -> None:
        self.peer = Peer()  # type: ignore[abstract]
        self.server = grpc.server(ThreadPoolExecutor(4))
        ps_pb2_grpc.add_ParameterShardServicer_to_server(self.peer, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.done: list[tuple[Outcome, list[Parcel]]] = []
        self.num_released = 0
        self.outbox = Outbox(
            PEER,
            f"127.0.0.1:{port}",
            RUN,
            on_sent=lambda parcel: None,
            on_done=lambda peer, parcels, outcome: self.done.append((outcome, parcels)),
            on_plan=lambda plan: None,
        )

    def put(self, message: Replicate | Records, *, has_tensors: bool) -> None:
        def unpin() -> None:
            self.num_released += 1

        tensors = [torch.zeros(8)] if has_tensors else []
        self.outbox.put(Parcel(Envelope(ME, PlanNumber(1, 1), 0, message), tensors, unpin))

    def put_sums(self, chunks: range) -> None:
        for chunk in chunks:
            self.put(Replicate(record(chunk)), has_tensors=True)

    def outcomes(self) -> list[tuple[Outcome, int]]:
        return [(outcome, len(parcels)) for outcome, parcels in self.done]


@pytest.fixture
def sending() -> Iterator[Sending]:
    made = Sending()
    yield made
    made.peer.may_answer.set()
    made.outbox.close()
    made.server.stop(0)


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end, "waited for 10 s"
        time.sleep(0.005)


def test_sums_behind_one_that_is_lost_are_lost_with_it_and_records_are_not(
    sending: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sums are sent again then. Did the old ones stay, each failure would add as many; a run once stood for a minute."""
    honest, blocked = envelopes.to_wire, threading.Event()

    def to_wire(envelope: Envelope, *rest: object, **options: object) -> Iterator[object]:
        yield from honest(envelope, *rest, **options)  # type: ignore[arg-type]
        if isinstance(envelope.message, Replicate):
            blocked.wait(10)  # as flow control does: the next message is not taken yet

    monkeypatch.setattr(envelopes, "to_wire", to_wire)
    sending.peer.refuses = True
    sending.put_sums(range(20))
    wait_for(lambda: sending.peer.num_calls == 1)
    sending.peer.may_answer.set()
    wait_for(lambda: bool(sending.done))
    assert sending.outcomes() == [("lost with tensors", 20)]
    sending.peer.refuses = False
    blocked.set()
    sending.put(Records((record(1),)), has_tensors=False)
    sending.put_sums(range(2))
    wait_for(lambda: sending.outcomes()[1:] in ([("delivered", 1), ("delivered", 2)], [("delivered", 2), ("delivered", 1)]))
    assert sending.peer.chunks == [0, 1]


def test_what_waits_when_a_plan_is_past_is_let_go(sending: Sending) -> None:
    sending.put_sums(range(1))
    wait_for(lambda: sending.peer.num_calls == 1)
    old = Parcel(Envelope(ME, PlanNumber(1, 1), 0, Replicate(record(5))), [torch.zeros(8)], lambda: dropped.append(5))
    dropped: list[int] = []
    with sending.outbox._changed:  # so that the call's thread takes nothing meanwhile
        sending.outbox.put(old)
        sending.outbox.drop()
    assert dropped == [5]
    sending.peer.may_answer.set()
    wait_for(lambda: bool(sending.done))
    assert 5 not in sending.peer.chunks
