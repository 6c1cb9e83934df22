"""What neighbours have sent and this stage has not used yet.

Items are keyed by kind, step and micro-batch within a plan. Each direction has half the byte budget: were it one, activations
of the next step could fill it and keep out the gradients that this step waits for. A full direction blocks its stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shardlane import rpc, wire
from shardlane.chunks import Assembly, BufferPool
from shardlane.errors import MalformedError, NotReadyError, StaleError
from shardlane.ids import Incarnation, MicroBatch, PlanNumber, RunId, Version
from shardlane.pb import tensor_pb2, worker_pb2
from worker_service.attempt import Attempt

ACTIVATION = worker_pb2.TRANSFER_KIND_ACTIVATION
GRADIENT = worker_pb2.TRANSFER_KIND_GRADIENT
VALIDATION = worker_pb2.TRANSFER_KIND_VALIDATION
STANDING = worker_pb2.TRANSFER_KIND_STANDING


class StepClosed(Exception):
    """The next version is published: nothing of the step is needed any more, and neighbours may have left it. Of a validation:
    the stage before has gone on without it.
    """


Direction = Literal["above", "below"]
Key = tuple[int, int, int]  # kind, step, micro-batch
Request = wire.Framed[worker_pb2.TransferRequest]


@dataclass(frozen=True, slots=True)
class Seat:
    """Who may send what in a replica that `number` formed. `shape` is [B, T, H], fp32: hidden states keep their dtype."""

    number: PlanNumber
    above: Incarnation | None  # the worker of the stage before
    below: Incarnation | None
    shape: tuple[int, int, int]
    num_micro_batches: int
    num_validations: int

    @property
    def num_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1] * self.shape[2]


class Inbox:
    """Filled by the threads of streams, emptied by the one that computes."""

    def __init__(
        self,
        me: Incarnation,
        run_id: RunId,
        budget_bytes: int,
        pool: BufferPool,
        *,
        on_ahead: Callable[[Version, PlanNumber], None],
        on_reseated: Callable[[PlanNumber], None],
        on_lane: Callable[[Direction, Version, MicroBatch], None],
        reads: Callable[[int], int] = lambda step: step,
        num_places: int = 1,
    ) -> None:
        """`on_ahead`: a neighbour in the replica that this plan formed knows a later version. `on_reseated`: one works in a
        replica that was formed later than the one here. `on_lane`: it asks from below, or tells from above, that the lane which
        begins with the micro-batch runs again. `reads`: the version that a step is computed from."""
        self._reads, self._num_places = reads, num_places
        self._begun: dict[int, int] = {}  # ASP: by place, the newest turn that was begun
        self._me, self._run_id, self._pool = me, run_id, pool
        self._budget_bytes = budget_bytes // 2
        self._on_ahead, self._on_reseated, self._on_lane = on_ahead, on_reseated, on_lane
        self._changed = threading.Condition()
        self._number = PlanNumber(0, 0)
        self._seat: Seat | None = None
        self._step = Version(0)  # the next, or under way
        self._version = Version(0)  # in the parameters
        self._published = Version(0)  # the newest version that is known here, or was told by a neighbour
        self._validated = -1  # no more comes of the validation of this version, nor of those before it
        self._items: dict[Key, Tensor] = {}
        self._known: set[Key] = set()  # here, on its way, or used: not taken a second time
        self._bytes: dict[Direction, int] = {"above": 0, "below": 0}
        self._stopping = False

    @property
    def num_bytes(self) -> int:
        """Held or on their way."""
        return sum(self._bytes.values())

    # ---- for the thread that computes ----------------------------------------------------------------------------------

    def open(self, number: PlanNumber, seat: Seat | None) -> None:
        """Takes up a plan: everything before it is void. `seat` is None for a worker that rests."""
        with self._changed:
            self._number, self._seat = number, seat
            # A roll-back goes to an earlier version, and a neighbour may be there first.
            self._step = self._version = self._published = Version(0)
            self._validated = -1
            self._begun.clear()
            self._drop(lambda key: True)
            self._changed.notify_all()

    def begin(self, step: Version, version: Version, published: Version) -> None:
        """Items of earlier steps than `step` are void, and of validations of earlier versions than `version`."""
        with self._changed:
            self._step, self._version, self._published = step, version, published
            self._begun[step % self._num_places] = step
            self._drop(self._is_past)
            self._changed.notify_all()

    def skip(self, number: Version) -> None:
        """ASP: the turn is closed, and will not be begun."""
        with self._changed:
            place = number % self._num_places
            self._begun[place] = max(number + 1, self._begun.get(place, 0))
            self._drop(self._is_past)

    def wait_offer(self, attempt: Attempt, wanted: Callable[[int], bool]) -> Version:
        """ASP: the turn of which something came first from above, of those that were not begun and are `wanted`. Raises
        `Abandoned`."""

        def offered() -> list[int]:
            fresh = (key[1] for key in self._items if key[0] != GRADIENT and wanted(key[1]))
            return [each for each in fresh if each != self._begun.get(each % self._num_places)]

        with self._changed:
            attempt.wait(self._changed, lambda: bool(offered()))
            return Version(offered()[0])

    def run_again(self, version: Version, micro_batches: range) -> None:
        """These will come, and be taken, once more."""
        with self._changed:
            self._drop(lambda key: key[0] != VALIDATION and key[1] == version and key[2] in micro_batches)

    def take(
        self, kind: int, version: Version, index: int, attempt: Attempt, is_closed: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Waits for an item: fp32 [B, T, H], the caller's until `give`. Raises `Abandoned`; `StepClosed` if it is not here and
        `is_closed`, which is looked at again after `wake`."""
        key = (kind, version, index)
        with self._changed:
            attempt.wait(self._changed, lambda: key in self._items or self._is_skipped(key) or is_closed())
            if key not in self._items:
                raise StepClosed
            item = self._items.pop(key)
            self._bytes[_direction(kind)] -= item.nbytes
            self._changed.notify_all()
            return item

    def _is_skipped(self, key: Key) -> bool:
        """What comes from above comes in order: validations of a version before the first step that reads it, or a later one."""
        return key[0] == VALIDATION and key[1] <= self._validated

    def give(self, item: Tensor) -> None:
        """The memory of an item may be used again."""
        self._pool.give(item)

    def wake(self) -> None:
        """Whoever waits for an item looks again whether the step is closed."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _is_past(self, key: Key) -> bool:
        if self._num_places > 1:
            return key[1] < self._begun.get(key[1] % self._num_places, 0)
        return key[1] < (self._version if key[0] == VALIDATION else self._step)

    def _drop(self, void: Callable[[Key], bool]) -> None:
        self._known = {key for key in self._known if not void(key)}
        for key in [key for key in self._items if void(key)]:
            item = self._items.pop(key)
            self._bytes[_direction(key[0])] -= item.nbytes
            self._pool.give(item)

    # ---- for streams ---------------------------------------------------------------------------------------------------

    def receive(self, requests: Iterator[Request], is_active: Callable[[], bool]) -> None:
        """Takes one stream, until it ends. Raises `RequestError` at the first message that is wrong; what was whole stays."""
        deadline = time.monotonic() + rpc.WAIT_SECONDS
        for request in requests:
            seat = self._check(request, deadline)
            self._note(seat, request.header)
            if request.header.kind == STANDING:
                pass
            elif not request.header.HasField("slice"):
                self._on_lane(
                    _direction(request.header.kind), Version(request.header.step), MicroBatch(request.header.micro_batch)
                )
            else:
                self._receive_item(seat, request, requests, is_active)
            deadline = time.monotonic() + rpc.WAIT_SECONDS

    def _note(self, seat: Seat, header: worker_pb2.TransferRequest) -> None:
        if header.sender == seat.above and self._num_places == 1:
            is_over = header.step - 1 if header.kind in (VALIDATION, STANDING) else self._reads(header.step)
            if is_over > self._validated:
                with self._changed:
                    self._validated = is_over
                    self._changed.notify_all()
        if header.published > self._published:
            self._published = Version(header.published)
            self._on_ahead(self._published, seat.number)

    def _receive_item(self, seat: Seat, first: Request, rest: Iterator[Request], is_active: Callable[[], bool]) -> None:
        header = first.header
        key = (int(header.kind), int(header.step), int(header.micro_batch))
        if not self._reserve(seat, key, is_active):
            _skip(first, rest)
            return
        item = self._pool.take(seat.num_bytes // 4).view(seat.shape)
        is_whole = False
        try:
            assembly = Assembly(item, _name(header))
            request = first
            while not assembly.add(request.header.slice, request.payload):
                request = _next_piece(header, rest)
                _check_piece(seat, request)
            is_whole = True
        finally:
            self._put(seat, key, item, is_whole)

    def _reserve(self, seat: Seat, key: Key, is_active: Callable[[], bool]) -> bool:
        """Waits for room. Whether the item is wanted: neither known already, nor of a closed step or another plan."""
        direction = _direction(key[0])

        def is_void() -> bool:
            return self._seat is not seat or self._is_past(key) or key in self._known

        def has_room() -> bool:
            held = self._bytes[direction]
            return held == 0 or held + seat.num_bytes <= self._budget_bytes

        with self._changed:
            while not (self._stopping or is_void() or has_room()):
                if not is_active():
                    return False
                self._changed.wait(1.0)  # a stream that broke while it was blocked wakes nobody
            if self._stopping:
                raise NotReadyError("this worker is stopping")
            if is_void():
                return False
            self._known.add(key)
            self._bytes[direction] += seat.num_bytes
            return True

    def _put(self, seat: Seat, key: Key, item: Tensor, is_whole: bool) -> None:
        with self._changed:
            if is_whole and self._seat is seat and key in self._known and not self._is_past(key):
                self._items[key] = item
            else:
                self._known.discard(key)
                self._bytes[_direction(key[0])] -= seat.num_bytes
                self._pool.give(item)
            self._changed.notify_all()

    def _check(self, request: Request, deadline: float) -> Seat:
        """The seat that a first piece is for. A sender of a newer plan waits until it is taken up here."""
        header = request.header
        if header.run_id != self._run_id:
            raise StaleError(f"this worker is of run {self._run_id!r}, the message of run {header.run_id!r}")
        if header.receiver != self._me:
            raise StaleError(f"{header.receiver} is gone; {self._me} is here now")
        number = wire.number_from_wire(header.plan)
        if number > self._number:
            self._on_reseated(number)
        with self._changed:
            while number > self._number and not self._stopping:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise NotReadyError(f"this worker has not heard of plan {number} yet")
            if self._stopping:
                raise NotReadyError("this worker is stopping")
            seat = self._seat
        if seat is None or number < seat.number:
            raise StaleError(f"plan {number} is past; {self._number} is the newest here")
        kind = header.kind
        if kind not in (ACTIVATION, GRADIENT, VALIDATION, STANDING):
            raise MalformedError(
                f"transfer kind {kind} is unknown; expected 1 (activation), 2 (gradient), 3 (validation) or 4 (standing)"
            )
        expected = seat.above if _direction(kind) == "above" else seat.below
        if header.sender != expected and not (kind == STANDING and header.sender in (seat.above, seat.below)):
            raise MalformedError(f"{_name(header)} came from {header.sender}; expected {expected or 'nobody'} there")
        bound = seat.num_validations if kind == VALIDATION else seat.num_micro_batches
        if header.micro_batch >= bound:
            raise MalformedError(f"{_name(header)}: there are {bound}")
        if kind == STANDING and header.HasField("slice"):
            raise MalformedError(f"{_name(header)} brings values")
        if header.HasField("slice"):
            _check_piece(seat, request)
            if tuple(header.slice.shape) != seat.shape or header.slice.offset:
                raise MalformedError(
                    f"{_name(header)}: shape {list(header.slice.shape)} from byte {header.slice.offset};"
                    f" expected {list(seat.shape)} from 0"
                )
        elif kind == VALIDATION:
            raise MalformedError(f"{_name(header)} brings no values")
        return seat


def _direction(kind: int) -> Direction:
    return "below" if kind == GRADIENT else "above"


def _name(header: worker_pb2.TransferRequest) -> str:
    names = {ACTIVATION: "activation", GRADIENT: "gradient", VALIDATION: "validation", STANDING: "standing"}
    return f"{names.get(header.kind, 'transfer')} {header.micro_batch} of step {header.step}"


def _check_piece(seat: Seat, request: Request) -> None:
    piece = request.header.slice
    wire.check_slice(piece, request.payload, total_bytes_max=seat.num_bytes, what=_name(request.header))
    if piece.total != seat.num_bytes or piece.dtype != tensor_pb2.D_TYPE_FLOAT32:
        raise MalformedError(
            f"{_name(request.header)}: {piece.total} bytes of dtype {piece.dtype}; expected {seat.num_bytes} of fp32"
        )


def _next_piece(header: worker_pb2.TransferRequest, rest: Iterator[Request]) -> Request:
    """Later pieces repeat what they are of, or say nothing of it."""
    request = next(rest, None)
    if request is None:
        raise MalformedError(f"{_name(header)}: the stream ended in the midst of it")
    said = request.header
    if said.kind and (said.kind, said.step, said.micro_batch) != (header.kind, header.step, header.micro_batch):
        raise MalformedError(f"{_name(header)}: a piece of another began in the midst of it")
    return request


def _skip(first: Request, rest: Iterator[Request]) -> None:
    request = first
    while request.header.slice.offset + len(request.payload) < first.header.slice.total:
        request = _next_piece(first.header, rest)
