"""Which version of each chunk may be pulled, and the calls that wait for the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from shardlane.ids import ChunkId, Version
from shardlane.turns import Clocks, has_come


class Publications:
    """Versions published by this shard as a primary. A version, once published, never changes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._versions: dict[ChunkId, Version] = {}
        self._clocks: dict[ChunkId, Clocks] = {}  # ASP
        self._generation = 0  # of the plan: a new one fails every waiting pull
        self.num_waiting = 0

    def publish(self, chunk: ChunkId, version: Version, clocks: Clocks = ()) -> None:
        with self._changed:
            self._versions[chunk], self._clocks[chunk] = version, clocks
            self._changed.notify_all()

    def withdraw(self, chunk: ChunkId) -> None:
        with self._changed:
            self._versions.pop(chunk, None)

    def fail_waiting(self) -> None:
        """Every waiting pull ends early and is asked again."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    @property
    def generation(self) -> int:
        return self._generation

    def oldest(self) -> int:
        """The version that every chunk published here has reached; -1 while there is none."""
        with self._changed:
            return min(self._versions.values(), default=-1)

    def wait_any(self, chunks: Iterable[ChunkId], version: Version, *, generation: int, deadline: float) -> list[ChunkId]:
        """Those of `chunks` whose published version is at least `version`, or whose turn that is, as soon as there is one.

        Empty at `deadline` (monotonic seconds) or when `generation` has passed.
        """
        waited = list(chunks)
        with self._changed:
            self.num_waiting += 1
            try:
                while True:
                    if self._generation != generation:
                        return []
                    ready = [chunk for chunk in waited if self._has(chunk, version)]
                    if ready:
                        return ready
                    remaining = deadline - time.monotonic()
                    if remaining <= 0 or not self._changed.wait(remaining):
                        return []
            finally:
                self.num_waiting -= 1

    def _has(self, chunk: ChunkId, version: Version) -> bool:
        published = self._versions.get(chunk)
        if published is None:
            return False
        clocks = self._clocks[chunk]
        return has_come(clocks, published, version) if clocks else published >= version
