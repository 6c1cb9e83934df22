"""A worker's pulls of a named version, as `worker_service/pulls.py` makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardlane.ids import ChunkId, Incarnation, Version
from shardlane.plan import Plan
from shardlane.rpc import WAIT_SECONDS
from tests.sim.sketch import History

if TYPE_CHECKING:
    from tests.sim.worker import WorkerProcess

RETRY_SECONDS = 0.1


@dataclass
class Asked:
    """One version that was asked for."""

    version: Version
    missing: dict[Incarnation, set[ChunkId]]
    values: dict[ChunkId, History] = field(default_factory=dict)
    cancelled: bool = False
    is_open: bool = False
    superseded: Version | None = None

    @property
    def settled(self) -> bool:
        return self.superseded is not None or not any(self.missing.values())

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.superseded is not None


class PullCall:
    """One call to one shard; its answers come one by one, and a lost one breaks it."""

    def __init__(self, puller: Puller, asked: Asked, shard: Incarnation, chunks: Iterable[ChunkId]) -> None:
        self.worker, self.version, self.timeline = puller.worker, asked.version, puller.plan.timeline.id
        self.waiting = set(chunks)  # the shard's
        self.arrives = 0.0  # when the newest answer does; the shard's too
        self._puller, self._asked, self._shard = puller, asked, shard
        self._was_refused = False
        self._has_ended = False

    def on_data(self, chunk: ChunkId, history: History) -> None:
        asked = self._asked
        if not self._has_ended and not asked.is_over and chunk in asked.missing[self._shard]:
            asked.missing[self._shard].discard(chunk)
            asked.values[chunk] = history
            self._puller.note(asked.version)

    def on_superseded(self, now: Version) -> None:
        asked = self._asked
        if not self._has_ended and not asked.cancelled:
            asked.superseded = max(now, asked.superseded or now)
            self._puller.note(now)

    def on_refused(self, chunk: ChunkId, plan: Plan) -> None:
        self._was_refused = True
        self.worker.offer(plan)

    def on_end(self) -> None:
        self._end("refused" if self._was_refused else "early")

    def on_failed(self) -> None:
        self._end("failed")

    def _end(self, how: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._puller.on_ended(self._asked, self._shard, how)


class Puller:
    def __init__(self, worker: WorkerProcess, plan: Plan, chunks: Iterable[ChunkId]) -> None:
        self.worker, self.plan = worker, plan
        self._chunks = sorted(set(chunks))
        self.asked: dict[Version, Asked] = {}
        self._newest: dict[int, Version] = {}  # by place, the newest that a shard has answered with
        self._num_places = worker.world.config.train.num_places

    @property
    def published(self) -> Version:
        return self._newest.get(0, Version(-1)) if self._num_places == 1 else Version(-1)

    def is_past(self, version: Version) -> bool:
        return self._newest.get(version % self._num_places, -1) > version

    def ask(self, version: Version) -> None:
        if version in self.asked:
            return
        for other in [each for each in self.asked if (each - version) % self._num_places == 0]:
            self.drop(other)
        self._begin(Asked(version, self._by_primary(self._chunks)))

    def come(self, versions: Iterable[Version]) -> list[Version]:
        """Those that a shard has, or is past."""
        return [each for each in versions if self._newest.get(each % self._num_places, -1) >= each]

    def open(self, version: Version) -> None:
        """What `take` does: from now on what comes of it reaches the parameters."""
        for other in [each.version for each in self.asked.values() if each.is_open and each.version != version]:
            self.drop(other)
        self.ask(version)
        self.asked[version].is_open = True

    def note(self, published: Version) -> None:
        place = published % self._num_places
        self._newest[place] = max(published, self._newest.get(place, Version(-1)))
        self.worker.pump()

    def cancel(self) -> None:
        for version in list(self.asked):
            self.drop(version)

    def drop(self, version: Version) -> None:
        self.asked.pop(version).cancelled = True

    def reroute(self, plan: Plan) -> None:
        self.plan = plan
        for asked in list(self.asked.values()):
            if asked.settled:
                continue
            missing = set[ChunkId]().union(*asked.missing.values())
            again = Asked(asked.version, self._by_primary(missing), asked.values, is_open=asked.is_open)
            if again.missing != {shard: chunks for shard, chunks in asked.missing.items() if chunks}:
                self.drop(asked.version)
                self._begin(again)

    def _by_primary(self, chunks: Iterable[ChunkId]) -> dict[Incarnation, set[ChunkId]]:
        return {shard: set(each) for shard, each in self.plan.by_primary(list(chunks)).items()}

    def _begin(self, asked: Asked) -> None:
        self.asked[asked.version] = asked
        for shard in list(asked.missing):
            self._pull_from(asked, shard)

    def _pull_from(self, asked: Asked, shard: Incarnation) -> None:
        chunks = [] if asked.is_over else sorted(asked.missing[shard])
        if not chunks:
            return
        call, worker = PullCall(self, asked, shard, chunks), self.worker
        process = worker.world.shards.get(shard)
        if process is None:
            worker.clock.after(RETRY_SECONDS, worker, call.on_failed)
            return
        worker.network.tell(worker, process, lambda: process.pull(call), call.on_failed)
        worker.clock.after(WAIT_SECONDS, worker, call.on_end)  # the shard holds it no longer

    def on_ended(self, asked: Asked, shard: Incarnation, how: str) -> None:
        if asked.is_over or not asked.missing[shard]:
            return
        if how != "refused":
            self.worker.on_pull_ended(shard)
        delay = 0.0 if how == "early" else RETRY_SECONDS
        self.worker.clock.after(delay, self.worker, lambda: self._pull_from(asked, shard))
