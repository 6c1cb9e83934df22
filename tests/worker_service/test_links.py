"""Two neighbours over loopback gRPC: what arrives, what is refused, what happens when the stream breaks or the inbox is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from shardlane import rpc, wire
from shardlane.chunks import BufferPool, byte_view
from shardlane.ids import Incarnation, PlanNumber, RunId, Version
from shardlane.pb import tensor_pb2, worker_pb2
from worker_service.attempt import Abandoned, Attempt
from worker_service.inbox import ACTIVATION, GRADIENT, STANDING, VALIDATION, Inbox, Seat, StepClosed
from worker_service.links import SERVICE, Link, Route
from worker_service.servicer import WorkerServicer
from worker_service.staging import HostTensor, Staging

RUN, ABOVE, ME, BELOW = RunId("run"), Incarnation("worker-a"), Incarnation("worker-b"), Incarnation("worker-c")
SHAPE = (2, 8, 32_768)  # 2 MiB: two messages
SIZE = 2 << 20


def seat(epoch: int = 1) -> Seat:
    return Seat(PlanNumber(1, epoch), ABOVE, BELOW, SHAPE, num_micro_batches=8, num_validations=2)


class Receiver:
    """A worker's server side, and what its callbacks heard."""

    def __init__(self, budget_bytes: int = 64 << 20) -> None:
        self.ahead: list[int] = []
        self.lanes: list[tuple[str, int, int]] = []
        pool = BufferPool(64 << 20)
        self.reseated: list[PlanNumber] = []
        told = {"on_ahead": lambda version, formed: self.ahead.append(version), "on_reseated": self.reseated.append}
        self.inbox = Inbox(ME, RUN, budget_bytes, pool, **told, on_lane=lambda *word: self.lanes.append(word))
        self.bind = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        pools = {"Transfer": ThreadPoolExecutor(4)}
        self.server = rpc.Server(self.bind, {SERVICE.full_name: rpc.handler(SERVICE, WorkerServicer(self.inbox), pools=pools)})
        self.server.start()
        self.bind = f"127.0.0.1:{self.server.port}"

    def take(self, kind: int, version: int, index: int) -> torch.Tensor:
        attempt = Attempt()
        timer = threading.Timer(10.0, attempt.abandon)
        timer.start()
        try:
            return self.inbox.take(kind, Version(version), index, attempt)
        finally:
            timer.cancel()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    made.inbox.open(seat().number, seat())
    yield made
    made.inbox.stop()
    made.server.stop(0)


@pytest.fixture
def link_to() -> Iterator[Callable[..., Link]]:
    made: list[Link] = []

    def make(
        receiver: Receiver, sender: Incarnation = ABOVE, epoch: int = 1, broken: list[str] | None = None, published: int = 0
    ) -> Link:
        route = Route(RUN, sender, ME, receiver.bind, PlanNumber(1, epoch), SHAPE)
        heard = [] if broken is None else broken
        made.append(
            Link(route, Staging(torch.device("cpu")), lambda peer, reason: heard.append(reason), lambda: Version(published))
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


def values(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def send(link: Link, kind: int, version: int, index: int, seed: int) -> None:
    link.send(kind, Version(version), index, HostTensor(values(seed).reshape(-1)))


def begin(receiver: Receiver, version: int) -> None:
    receiver.inbox.begin(Version(version), Version(version), Version(version))


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end, "waited for 10 s"
        time.sleep(0.005)


def test_items_of_every_kind_arrive_whole(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    above, below = link_to(receiver), link_to(receiver, BELOW)
    send(above, VALIDATION, 0, 1, seed=1)
    send(above, ACTIVATION, 0, 0, seed=2)
    send(below, GRADIENT, 0, 0, seed=3)
    for kind, index, seed in [(GRADIENT, 0, 3), (ACTIVATION, 0, 2), (VALIDATION, 1, 1)]:
        item = receiver.take(kind, 0, index)
        assert torch.equal(item, values(seed))
        assert item.data_ptr() % 64 == 0
        receiver.inbox.give(item)
    assert receiver.inbox.num_bytes == 0


def test_a_full_inbox_blocks_the_stream_and_the_other_direction_does_not_care(link_to: Callable[..., Link]) -> None:
    receiver = Receiver(budget_bytes=2 * 2 * SIZE)  # two items a direction
    receiver.inbox.open(seat().number, seat())
    above, below = link_to(receiver), link_to(receiver, BELOW)
    for index in range(4):
        send(above, ACTIVATION, 0, index, seed=index)
    wait_for(lambda: receiver.inbox.num_bytes == 2 * SIZE)
    send(below, GRADIENT, 0, 0, seed=9)
    assert torch.equal(receiver.take(GRADIENT, 0, 0), values(9))
    assert receiver.inbox.num_bytes == 2 * SIZE
    for index in range(4):
        assert torch.equal(receiver.take(ACTIVATION, 0, index), values(index))
    receiver.inbox.stop()
    receiver.server.stop(0)


def test_a_broken_stream_is_noticed_opened_again_and_loses_nothing(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    broken: list[str] = []
    link = link_to(receiver, broken=broken)
    send(link, ACTIVATION, 0, 0, seed=0)
    assert torch.equal(receiver.take(ACTIVATION, 0, 0), values(0))
    began = time.monotonic()
    receiver.server.stop(0)
    wait_for(lambda: bool(broken))
    assert time.monotonic() - began < 2.0
    send(link, ACTIVATION, 0, 1, seed=1)
    receiver.start()
    assert torch.equal(receiver.take(ACTIVATION, 0, 1), values(1))
    assert receiver.inbox.num_bytes == 0, "what came a second time was not taken"


def test_a_receiver_of_an_older_plan_waits_for_it(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    link = link_to(receiver, epoch=2)
    send(link, ACTIVATION, 0, 0, seed=5)
    time.sleep(0.2)
    assert receiver.inbox.num_bytes == 0
    receiver.inbox.open(seat(2).number, seat(2))
    assert torch.equal(receiver.take(ACTIVATION, 0, 0), values(5))


def test_a_later_version_is_heard_of_and_earlier_steps_are_dropped(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    link = link_to(receiver, published=4)
    begin(receiver, 3)
    send(link, ACTIVATION, 2, 0, seed=1)
    send(link, ACTIVATION, 4, 0, seed=2)
    wait_for(lambda: receiver.ahead == [4])
    wait_for(lambda: receiver.inbox.num_bytes == SIZE)
    begin(receiver, 4)
    assert torch.equal(receiver.take(ACTIVATION, 4, 0), values(2))


def test_a_neighbour_that_leaves_a_closed_step_undone_says_so(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    for sender, published in ((ABOVE, 2), (BELOW, 3)):
        link_to(receiver, sender, published=published).send(STANDING, Version(published), 0)
        wait_for(lambda published=published: receiver.ahead[-1:] == [published])  # type: ignore[misc]
    assert receiver.ahead == [2, 3] and receiver.lanes == []


def test_a_validation_that_the_stage_before_has_gone_past_is_not_waited_for(
    receiver: Receiver, link_to: Callable[..., Link]
) -> None:
    link = link_to(receiver)
    begin(receiver, 3)
    send(link, VALIDATION, 3, 0, seed=1)
    send(link, ACTIVATION, 3, 0, seed=2)
    assert torch.equal(receiver.take(VALIDATION, 3, 0), values(1)), "what is here is taken"
    with pytest.raises(StepClosed):
        receiver.take(VALIDATION, 3, 1)


def test_the_validations_of_what_the_stage_before_loads_next_are_still_to_come(
    receiver: Receiver, link_to: Callable[..., Link]
) -> None:
    link = link_to(receiver, published=4)
    begin(receiver, 3)
    link.send(STANDING, Version(3), 0)
    wait_for(lambda: receiver.ahead == [4])
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(receiver.take, VALIDATION, 3, 0)
        send(link, VALIDATION, 3, 0, seed=1)
        assert torch.equal(taken.result(30), values(1))
        link.send(STANDING, Version(4), 0)
        with pytest.raises(StepClosed):
            receiver.take(VALIDATION, 3, 1)


def test_a_lane_that_runs_again_is_taken_again(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    link = link_to(receiver)
    send(link, ACTIVATION, 0, 2, seed=1)
    receiver.inbox.give(receiver.take(ACTIVATION, 0, 2))
    link.send(ACTIVATION, Version(0), 2)
    wait_for(lambda: receiver.lanes == [("above", 0, 2)])
    receiver.inbox.run_again(Version(0), range(2, 4))
    send(link, ACTIVATION, 0, 2, seed=1)
    assert torch.equal(receiver.take(ACTIVATION, 0, 2), values(1))


def test_a_neighbour_that_goes_back_to_an_earlier_version_sooner_is_heard(
    receiver: Receiver, link_to: Callable[..., Link]
) -> None:
    """After a roll-back: its first activations come before this stage has begun with that version."""
    begin(receiver, 5)
    receiver.inbox.open(seat(2).number, seat(2))
    send(link_to(receiver, epoch=2), ACTIVATION, 3, 0, seed=1)
    wait_for(lambda: receiver.inbox.num_bytes == 4 * values(1).numel())
    begin(receiver, 3)
    assert torch.equal(receiver.take(ACTIVATION, 3, 0), values(1))


def test_a_wait_ends_when_the_step_is_closed_but_what_is_here_is_taken(receiver: Receiver, link_to: Callable[..., Link]) -> None:
    send(link_to(receiver), ACTIVATION, 0, 0, seed=1)
    wait_for(lambda: receiver.inbox.num_bytes == 4 * values(1).numel())
    closed: list[bool] = []
    attempt = Attempt()
    assert torch.equal(receiver.inbox.take(ACTIVATION, Version(0), 0, attempt, lambda: bool(closed)), values(1))

    def close() -> None:
        closed.append(True)
        receiver.inbox.wake()

    threading.Timer(0.05, close).start()
    with pytest.raises(StepClosed):
        receiver.inbox.take(ACTIVATION, Version(0), 1, attempt, lambda: bool(closed))


def test_a_wait_ends_when_the_work_is_abandoned(receiver: Receiver) -> None:
    attempt = Attempt()
    threading.Timer(0.1, attempt.abandon).start()
    with pytest.raises(Abandoned):
        receiver.inbox.take(ACTIVATION, Version(0), 0, attempt)


# ---- what is refused ----------------------------------------------------------------------------------------------------


def request(payload: bytes | None = None, **changes: Any) -> wire.Framed[worker_pb2.TransferRequest]:
    fields: dict[str, Any] = {
        "run_id": RUN, "sender": ABOVE, "receiver": ME, "plan": tensor_pb2.PlanNumber(term=1, epoch=1), "step": 0,
        "micro_batch": 0, "kind": ACTIVATION, "dtype": 1, "offset": 0, "total": SIZE, "shape": SHAPE,
    }  # fmt: skip
    fields |= changes
    piece = tensor_pb2.Slice(**{name: fields.pop(name) for name in ("dtype", "offset", "total", "shape")})
    data = bytes(byte_view(values(0)))[: 1 << 20] if payload is None else payload
    return wire.Framed(worker_pb2.TransferRequest(slice=piece, **fields), data)


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"run_id": "other"}, "FAILED_PRECONDITION", "other"),
        ({"receiver": "worker-z"}, "FAILED_PRECONDITION", "worker-z is gone"),
        ({"plan": tensor_pb2.PlanNumber(term=0, epoch=9)}, "FAILED_PRECONDITION", "plan 0.9 is past"),
        ({"sender": BELOW}, "INVALID_ARGUMENT", "came from worker-c; expected worker-a"),
        ({"kind": GRADIENT}, "INVALID_ARGUMENT", "expected worker-c"),
        ({"kind": 0}, "INVALID_ARGUMENT", "kind 0"),
        ({"micro_batch": 8}, "INVALID_ARGUMENT", "there are 8"),
        ({"kind": VALIDATION, "micro_batch": 2}, "INVALID_ARGUMENT", "there are 2"),
        ({"total": SIZE * 2, "shape": ()}, "RESOURCE_EXHAUSTED", "at most"),
        ({"total": SIZE // 2, "shape": ()}, "INVALID_ARGUMENT", "expected 2097152 of fp32"),
        ({"dtype": 2}, "INVALID_ARGUMENT", "shape"),
        ({"dtype": 4}, "INVALID_ARGUMENT", "expected 2097152 of fp32"),
        ({"dtype": 77}, "INVALID_ARGUMENT", "dtype 77"),
        ({"offset": 4}, "INVALID_ARGUMENT", "from byte 4"),
        ({"shape": (SHAPE[1], SHAPE[0], SHAPE[2])}, "INVALID_ARGUMENT", "expected [2, 8, 32768]"),
        ({"payload": b""}, "INVALID_ARGUMENT", "do not lie within"),
        ({"payload": b"abc"}, "INVALID_ARGUMENT", "multiples of 4"),
    ],
)
def test_a_wrong_message_is_refused_before_memory_is_taken(receiver: Receiver, changes: Any, code: str, names: str) -> None:
    with rpc.connect(receiver.bind) as channel, pytest.raises(grpc.RpcError) as refusal:
        rpc.Client(channel, SERVICE).Transfer(iter([request(**changes)]), timeout=10)
    assert refusal.value.code().name == code
    assert names in refusal.value.details()
    assert receiver.inbox.num_bytes == 0


@pytest.mark.parametrize(
    ("second", "names"),
    [
        ({"offset": 4}, "must begin at 1048576"),
        ({"offset": 1 << 20, "micro_batch": 1}, "another began"),
        (None, "ended in the midst"),
    ],
    ids=["overlap", "another", "end"],
)
def test_an_item_that_does_not_come_whole_frees_its_memory(receiver: Receiver, second: Any, names: str) -> None:
    pieces = [request(), *([request(**second)] if second else [])]
    with rpc.connect(receiver.bind) as channel, pytest.raises(grpc.RpcError) as refusal:
        rpc.Client(channel, SERVICE).Transfer(iter(pieces), timeout=10)
    assert names in refusal.value.details()
    assert receiver.inbox.num_bytes == 0
