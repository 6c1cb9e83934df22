"""When versions and plans appear, seen from outside: one gauge of each service, read fifty times a second.

The coordinator hears of steps by heartbeats, and may be the one that is dead; shards say at once what they have published.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 0.25  # a stopped process must not hide what comes after it
RETRY_SECONDS = 0.1
SIGHTINGS_MAX = 1 << 16
ORDINARY_SIGHTINGS = 24  # over which an ordinary step is measured


class Track:
    """A number that rises: when each value was first seen. One thread writes, any may read."""

    def __init__(self) -> None:
        self.sightings: deque[tuple[float, int]] = deque(maxlen=SIGHTINGS_MAX)  # (monotonic seconds, value), both rising
        self._lock = threading.Lock()

    def take(self, seconds: float, value: int) -> None:
        with self._lock:
            if value > self.newest:
                self.sightings.append((seconds, value))

    @property
    def newest(self) -> int:
        """-1 before the first."""
        return self.sightings[-1][1] if self.sightings else -1

    def first(self, value: int) -> float | None:
        """When `value`, or one beyond it, was first seen."""
        with self._lock:
            return next((seconds for seconds, found in self.sightings if found >= value), None)

    def forget(self) -> None:
        """After a roll-back the number rises from below."""
        with self._lock:
            self.sightings.clear()

    def ordinary_seconds(self) -> float:
        """Between a value and the next, the median of the newest; 0 while too little was seen."""
        with self._lock:
            newest = list(self.sightings)[-ORDINARY_SIGHTINGS:]
        spans = [(then - now) / (b - a) for (now, a), (then, b) in pairwise(newest)]
        return statistics.median(spans) if spans else 0.0

    def longest_seconds(self, begin: float, end: float) -> float:
        """Between one value and the next, within a span of time."""
        with self._lock:
            within = [seconds for seconds, _ in self.sightings if begin <= seconds <= end]
        return max((then - now for now, then in pairwise([begin, *within, end])), default=0.0)


class Watch:
    """Reads while it is entered: versions that shards publish, epochs and terms of the coordinator's plans."""

    def __init__(self, ready_files: Mapping[str, Path]) -> None:
        """`ready_files` of the coordinator and of shards, by name. One is read again when its process does not answer: it may
        have been started again."""
        self.versions = Track()
        self.epochs = Track()
        self.under_replicated = 0  # chunks, as the coordinator last said
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._poll, args=(name, file), name=f"watch-{name}", daemon=True)
            for name, file in ready_files.items()
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _poll(self, name: str, ready_file: Path) -> None:
        while not self._stopping.is_set():
            if (address := metrics_address(ready_file)) is not None:
                connection = HTTPConnection(address, timeout=TIMEOUT_SECONDS)
                try:
                    self._read(name, connection)
                except (OSError, HTTPException):  # it has just died, or is stopped
                    pass
                finally:
                    connection.close()
            self._stopping.wait(RETRY_SECONDS)

    def _read(self, name: str, connection: HTTPConnection) -> None:
        names = ["shardlane_shard_version"]
        if name == "coordinator":
            names = ["shardlane_coordinator_plan_epoch", "shardlane_coordinator_under_replicated_chunks"]
        path = "/metrics?" + "&".join(f"name[]={each}" for each in names)
        while not self._stopping.wait(POLL_SECONDS):
            connection.request("GET", path)
            gauges = parse_gauges(connection.getresponse().read().decode())
            now = time.monotonic()
            if name == "coordinator":
                self.epochs.take(now, int(gauges[names[0]]))
                self.under_replicated = int(gauges[names[1]])
            else:
                self.versions.take(now, int(gauges[names[0]]))


def metrics_address(ready_file: Path) -> str | None:
    """As the process has said when it was ready; None if it has not."""
    try:
        return str(json.loads(ready_file.read_bytes())["metrics_address"]) or None
    except (OSError, ValueError, KeyError):
        return None


def parse_gauges(page: str) -> dict[str, float]:
    """Of a Prometheus page, those without labels."""
    pairs = (line.split() for line in page.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value, *_ in pairs}
