"""Work that can be abandoned: every wait of a worker ends when its attempt does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Abandoned(Exception):
    """The attempt that this work belongs to is over."""


class Attempt:
    """The right to go on with a piece of work. `abandon` may be called by any thread, and wakes whoever waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abandoned = False
        self._wakers: list[Callable[[], None]] = []

    @property
    def abandoned(self) -> bool:
        return self._abandoned

    def check(self) -> None:
        """Raises `Abandoned`."""
        if self._abandoned:
            raise Abandoned

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def wait(self, condition: threading.Condition, ready: Callable[[], bool]) -> None:
        """Waits, holding `condition`, until `ready()`. Raises `Abandoned`."""

        def wake() -> None:
            with condition:
                condition.notify_all()

        with self._waking(wake):
            condition.wait_for(lambda: self._abandoned or ready())
            self.check()

    @contextmanager
    def _waking(self, wake: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            self._wakers.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(wake)
