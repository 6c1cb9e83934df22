"""What neighbouring stages send one another, as `worker_service/inbox.py` and `links.py` do it, without budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardlane.ids import Incarnation, Lane, PlanNumber, Version
from shardlane.turns import is_before
from tests.sim.network import RefusedError
from worker_service.core import events

if TYPE_CHECKING:
    from tests.sim.worker import WorkerProcess

RETRY_SECONDS = 0.1
ACTIVATION, GRADIENT, VALIDATION, STANDING = "activation", "gradient", "validation", "standing"


@dataclass(frozen=True, slots=True)
class Item:
    """`index` is a micro-batch, of which a lane has one. A word says that its lane is asked for, or will run again."""

    kind: str
    version: Version
    index: int
    is_word: bool = False

    @property
    def key(self) -> tuple[str, int, int]:
        return self.kind, self.version, self.index


class Inbox:
    """What has come and was not used yet."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._number = PlanNumber(0, 0)
        self._is_seated = False
        self._step = self._version = self._published = Version(0)
        self._validated = -1
        self._num_places = worker.world.config.train.num_places
        self._begun: dict[int, int] = {}
        self.items: dict[tuple[str, int, int], None] = {}  # in the order in which they came
        self._known: set[tuple[str, int, int]] = set()

    def open(self, number: PlanNumber, is_seated: bool) -> None:
        self._number, self._is_seated = number, is_seated
        self._step = self._version = self._published = Version(0)
        self._validated = -1
        self._begun.clear()
        self.items.clear()
        self._known.clear()

    def begin(self, step: Version, version: Version, published: Version) -> None:
        self._step, self._version, self._published = step, version, published
        self._begun[step % self._num_places] = step
        self._drop_past()

    def _drop_past(self) -> None:
        self.items = {key: None for key in self.items if not self._is_past(key)}
        self._known = {key for key in self._known if not self._is_past(key)}

    def skip(self, number: Version) -> None:
        place = number % self._num_places
        self._begun[place] = max(number + 1, self._begun.get(place, 0))
        self._drop_past()

    def offered(self, *, only_last: bool) -> list[Version]:
        fresh = [key[1] for key in self.items if key[0] != GRADIENT]
        if only_last:
            fresh = [each for each in fresh if each % self._num_places == self._num_places - 1]
        return [Version(each) for each in fresh if each != self._begun.get(each % self._num_places)]

    def _is_past(self, key: tuple[str, int, int]) -> bool:
        if self._num_places > 1:
            return key[1] < self._begun.get(key[1] % self._num_places, 0)
        return key[1] < (self._version if key[0] == VALIDATION else self._step)

    def is_skipped(self, key: tuple[str, int, int]) -> bool:
        return key[0] == VALIDATION and key[1] <= self._validated

    def run_again(self, version: Version, lane: Lane) -> None:
        void = {(ACTIVATION, version, lane), (GRADIENT, version, lane)}
        self.items = {key: None for key in self.items if key not in void}
        self._known -= void

    def receive(self, number: PlanNumber, item: Item, published: Version, *, is_above: bool) -> None:
        worker = self._worker
        if number > self._number:
            worker.post(events.PeerReseated(number))
        if number > self._number:  # the real one waits; here the sender comes again
            raise RefusedError("not ready")
        if not self._is_seated or number < self._number:
            raise RefusedError("stale")
        if self._num_places > 1:
            pass
        elif is_above:
            is_over = item.version - 1 if item.kind in (VALIDATION, STANDING) else worker.world.config.train.reads(item.version)
            self._validated = max(self._validated, is_over)
        worker.pump()
        if published > self._published:
            self._published = published
            worker.post(events.PeerAhead(published, number))
        if item.kind == STANDING:
            return
        if item.is_word:
            lane = Lane(item.index)
            word = events.LaneAsked if item.kind == GRADIENT else events.LaneTold
            worker.post(word(item.version, lane))
            return
        if number == self._number and self._is_seated and not self._is_past(item.key) and item.key not in self._known:
            self._known.add(item.key)
            self.items[item.key] = None
            worker.pump()


class Link:
    """One direction to one neighbour: in order, and again from the open step's first item when it breaks."""

    def __init__(
        self,
        worker: WorkerProcess,
        receiver: Incarnation,
        number: PlanNumber,
        published: Callable[[], Version],
        *,
        is_above: bool,
    ) -> None:
        """`is_above`: this stage comes before the receiver's."""
        self._is_above = is_above
        self._worker, self._receiver, self._number, self._published = worker, receiver, number, published
        self._items: list[Item] = []
        self._next = 0
        self._is_busy = False
        self._closed = False

    def send(self, item: Item) -> None:
        self._items.append(item)
        self._send_next()

    def begin(self, version: Version) -> None:
        num_places = self._worker.world.config.train.num_places
        self._next -= sum(is_before(item.version, version, num_places) for item in self._items[: self._next])
        self._items = [item for item in self._items if not is_before(item.version, version, num_places)]

    def close(self) -> None:
        self._closed = True

    def _send_next(self) -> None:
        if self._closed or self._is_busy or self._next >= len(self._items):
            return
        item, worker = self._items[self._next], self._worker
        self._next += 1
        self._is_busy = True
        neighbour = worker.world.workers.get(self._receiver)

        def on_reply(_: object) -> None:
            self._is_busy = False
            self._send_next()

        def on_failure(_: RefusedError | None) -> None:
            if not self._closed:
                self._next = 0
                worker.clock.after(RETRY_SECONDS, worker, lambda: on_reply(None))

        published = self._published()

        def handle() -> None:
            if neighbour is not None:
                neighbour.inbox.receive(self._number, item, published, is_above=self._is_above)

        worker.network.call(worker, neighbour, handle, on_reply, on_failure)
