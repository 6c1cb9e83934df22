"""Members that no stream vouches for: their ports are tried until they are heard again, or nobody listens there any more."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from coordinator.shell import Coordinator
from shardlane.ids import Incarnation

PROBES_MAX = 8  # at a time


class Doubts:
    """An open WatchPlans shows a member's death by breaking. Then, and for members that have not come back yet to a coordinator
    that was started again, the port decides, tried at every tick: a process that dies closes its connections one after another,
    and the first try may still find somebody.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._pool = ThreadPoolExecutor(PROBES_MAX, thread_name_prefix="probe")
        self._lock = threading.Lock()
        self._streams: Counter[Incarnation] = Counter()
        self._doubtful = set(coordinator.members)  # of an earlier coordinator
        self._probed: set[Incarnation] = set()  # at present

    @property
    def watched(self) -> set[Incarnation]:
        """Who has a stream open."""
        with self._lock:
            return set(self._streams)

    def opened(self, incarnation: Incarnation) -> None:
        """A stream that may vouch for the member."""
        with self._lock:
            self._streams[incarnation] += 1
            self._doubtful.discard(incarnation)

    def closed(self, incarnation: Incarnation, *, is_broken: bool) -> None:
        with self._lock:
            self._streams[incarnation] -= 1
            if self._streams[incarnation] > 0:
                return  # it has asked anew meanwhile
            del self._streams[incarnation]
            if is_broken:
                self._doubtful.add(incarnation)
        if is_broken:
            self.probe()

    def probe(self) -> None:
        """Tries all that are in doubt. Returns at once."""
        members = self._coordinator.members if self._doubtful else []
        with self._lock:
            self._doubtful.intersection_update(members)
            trying = self._doubtful - self._probed
            self._probed |= trying
        with suppress(RuntimeError):  # closed
            for incarnation in trying:
                self._pool.submit(self._probe, incarnation)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _probe(self, incarnation: Incarnation) -> None:
        try:
            self._coordinator.suspect(incarnation)
        finally:
            with self._lock:
                self._probed.discard(incarnation)
