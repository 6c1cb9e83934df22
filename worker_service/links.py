"""The way to one neighbour: a long-lived stream that is opened again when it breaks.

What was sent in open steps is kept, since nobody knows how much of a broken stream arrived; a new stream begins with all of
it, and the receiver skips what it has. In-flight activations follow the schedule, so this holds at most a step's tensors.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from shardlane import rpc, wire
from shardlane.chunks import byte_view
from shardlane.ids import Incarnation, MicroBatch, PlanNumber, RunId, Version
from shardlane.pb import tensor_pb2, worker_pb2
from shardlane.turns import is_before
from worker_service.inbox import Request
from worker_service.staging import HostTensor, Staging

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["PipelineWorker"]
CALLERS = {"Transfer": ("worker",)}
RETRY_SECONDS = 0.1
NEWS_SECONDS = 5.0  # a stream that breaks for the reason of the one before is news only if it lasted so long


@dataclass(slots=True, eq=False)
class _Item:
    kind: int
    version: Version
    micro_batch: int
    host: HostTensor | None = None  # None: a word about a lane, without values
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """From whom to whom, in the replica that `number` formed."""

    run_id: RunId
    sender: Incarnation
    receiver: Incarnation
    address: str
    number: PlanNumber
    shape: tuple[int, int, int]


class Link:
    """One direction to one neighbour in one replica. `send` never blocks."""

    def __init__(
        self,
        route: Route,
        staging: Staging,
        on_broken: Callable[[Incarnation, str], None],
        published: Callable[[], Version] = lambda: Version(0),
        network: rpc.Network = rpc.PLAIN,
        num_places: int = 1,
    ) -> None:
        """`on_broken` hears at once of a stream that broke, and why; not of every vain attempt to open it again. `published`: the
        newest version that is known here, which the neighbour is told.
        """
        self._route, self._staging, self._on_broken, self._published = route, staging, on_broken, published
        self._num_places = num_places
        self._changed = threading.Condition()
        self._items: list[_Item] = []  # of the open step, in order
        self._next = 0  # the first that the present stream has not begun
        self._stream = 0  # number of the present stream
        self._closed = False
        self._channel = network.connect(route.address, to="worker")
        self._thread = threading.Thread(target=self._run, name=f"link-{route.receiver}", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        with self._changed:
            return sum(item.host.values.nbytes for item in self._items if item.host is not None)

    def begin(self, version: Version) -> None:
        """`version` is published: what belongs to earlier steps, under ASP of the same lane, need not arrive any more."""
        with self._changed:
            is_gone = [is_before(item.version, version, self._num_places) for item in self._items]
            gone = [item for item, over in zip(self._items, is_gone, strict=True) if over]
            self._next -= sum(is_gone[: self._next])
            self._items = [item for item, over in zip(self._items, is_gone, strict=True) if not over]
            self._drop(gone)

    def send(self, kind: int, version: Version, micro_batch: int, host: HostTensor | None = None) -> None:
        """`host`: fp32 [B · T · H], the link's from now on; None sends word of the lane that begins with `micro_batch`."""
        with self._changed:
            self._items.append(_Item(kind, version, micro_batch, host))
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._channel.close()  # cancels the stream
        self._thread.join(timeout=5.0)
        with self._changed:
            gone, self._items = self._items, []
            self._drop(gone)

    def _drop(self, items: list[_Item]) -> None:
        for item in items:
            item.dropped = True
            if item.host is not None:
                self._staging.release(item.host)

    def _run(self) -> None:
        client, last_code = rpc.Client(self._channel, SERVICE), ""
        while not self._closed:
            with self._changed:
                self._stream += 1
                self._next = 0
                self._changed.wait_for(lambda: self._closed or bool(self._items))
                stream = self._stream
            if self._closed:
                return
            code, details = "ok", "the neighbour ended the stream"
            began_seconds = time.monotonic()
            try:
                client.Transfer(self._pieces(stream))  # no deadline: it lasts as long as the plan, and keep-alives watch it
            except grpc.RpcError as error:
                code, details = error.code().name.lower(), error.details() or ""
            except ValueError:  # the channel was closed
                return
            with self._changed:
                self._stream += 1  # ends the generator, should it still wait
                self._changed.notify_all()
                if self._closed:
                    return
            if code != last_code or time.monotonic() - began_seconds > NEWS_SECONDS:
                self._on_broken(self._route.receiver, f"{code}: {details}")
            last_code = code
            with self._changed:
                self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)

    def _pieces(self, stream: int) -> Iterator[Request]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._stream != stream or self._next < len(self._items))
                if self._closed or self._stream != stream:
                    return
                item = self._items[self._next]
                self._next += 1
            yield from self._item_pieces(item)

    def _item_pieces(self, item: _Item) -> Iterator[Request]:
        route = self._route
        header = worker_pb2.TransferRequest(
            run_id=route.run_id,
            sender=route.sender,
            receiver=route.receiver,
            plan=wire.number_to_wire(route.number),
            step=item.version,
            micro_batch=MicroBatch(item.micro_batch),
            kind=worker_pb2.TransferKind.Name(item.kind),
            published=self._published(),
        )
        if item.host is None:
            yield wire.Framed(header)
            return
        if item.host.wait is not None:
            item.host.wait()
        view = byte_view(item.host.values)
        for start, end in wire.payload_ranges(len(view)):
            piece = tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, offset=start, total=len(view), shape=route.shape)
            header.slice.CopyFrom(piece)
            yield wire.Framed(header, view[start:end])
