"""Simulated time and an in-memory network that loses, doubles, delays and reorders, with partitions. One seed replays it all."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Action = Callable[[], None]


class Process:
    """Something that can be killed, for good, or stopped for a while with all that it knows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.asleep_until = 0.0

    def __repr__(self) -> str:
        return self.name


class RefusedError(Exception):
    """The callee was there and refused; `reason` is a word for the trace, `cause` what it refused with."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Weather:
    """What the network does to a message."""

    lose: float = 0.02
    double: float = 0.02
    linger: float = 0.03  # probability of a delay of up to half a second
    loiter: float = 0.003  # and of one of seconds, beyond leases and plans


class Clock:
    """Events in order of time. `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Process | None, Action, Action | None]] = []
        self._num_planned = 0

    def after(self, seconds: float, owner: Process | None, action: Action, orphan: Action | None = None) -> None:
        """Does `action` later, unless `owner` is dead by then: then `orphan`. One that is asleep does it when it wakes up."""
        self._num_planned += 1
        heapq.heappush(self._heap, (self.now + seconds, self._num_planned, owner, action, orphan))

    def step(self) -> bool:
        """The next event; False if there is none."""
        if not self._heap:
            return False
        at, number, owner, action, orphan = heapq.heappop(self._heap)
        self.now = max(at, self.now)
        if owner is not None:
            if not owner.alive:
                if orphan is not None:
                    orphan()
                return True
            if owner.asleep_until > at:
                heapq.heappush(self._heap, (owner.asleep_until, number, owner, action, orphan))
                return True
        self.num_events += 1
        action()
        return True


class Network:
    """Calls between processes. A call ends in one of `on_reply` and `on_failure` unless the caller dies."""

    def __init__(self, clock: Clock, chance: random.Random, weather: Weather, num: Counter[str]) -> None:
        self.clock, self.weather = clock, weather
        self.trace: Callable[[str], None] | None = None
        self._random = chance.random
        self._num = num
        self._islands: dict[Process, int] = {}  # of a partition; who is on none is on island 0

    def part(self, islands: dict[Process, int]) -> None:
        """Messages sent between islands are lost; {} heals."""
        self._islands = islands

    def is_cut(self, one: Process, other: Process) -> bool:
        return bool(self._islands) and self._islands.get(one, 0) != self._islands.get(other, 0)

    def latency(self) -> float:
        roll, length = self._random(), self._random()
        if roll < self.weather.loiter:
            return 6.0 * length
        return 0.5 * length if roll < self.weather.loiter + self.weather.linger else 0.001 + 0.004 * length

    def loses(self, sender: Process, receiver: Process) -> bool:
        if self.is_cut(sender, receiver):
            self._num["cut"] += 1
            return True
        if self._random() < self.weather.lose:
            self._num["lost"] += 1
            return True
        return False

    def tell(
        self, sender: Process, receiver: Process, action: Action, on_failure: Action | None = None, not_before: float = 0.0
    ) -> float:
        """One way; when it arrives. `on_failure` is for the sender, and comes only if the message does not arrive."""

        def fail() -> None:
            if on_failure is not None:
                self.clock.after(self.latency(), sender, on_failure)

        if not receiver.alive or self.loses(sender, receiver):
            fail()
            return not_before
        seconds = max(self.latency(), not_before - self.clock.now)
        self.clock.after(seconds, receiver, action, fail)
        return self.clock.now + seconds

    def call(
        self,
        caller: Process,
        callee: Process | None,
        handle: Callable[[], Any],
        on_reply: Callable[[Any], None],
        on_failure: Callable[[RefusedError | None], None],
    ) -> None:
        """`handle` is what the callee does; it may raise `RefusedError`, which `on_failure` gets."""

        def fail(error: RefusedError | None = None) -> None:
            self.clock.after(self.latency(), caller, lambda: on_failure(error))

        def arrive() -> None:
            assert callee is not None
            try:
                reply = handle()
            except RefusedError as error:
                fail(error)
                return
            if not callee.alive or self.loses(callee, caller):
                fail()
            else:
                self.clock.after(self.latency(), caller, lambda: on_reply(reply))

        def repeat() -> None:
            self._num["doubled"] += 1
            with suppress(RefusedError):
                handle()

        if callee is None or not callee.alive or self.loses(caller, callee):
            fail()
            return
        self.clock.after(self.latency(), callee, arrive, fail)
        if self._random() < self.weather.double:
            self.clock.after(self.latency() + self.latency(), callee, repeat)
