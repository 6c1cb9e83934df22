"""A process that is a member of the run: it registers, keeps its lease, hears of plans, and tells what it has to tell.

What `shardlane/member.py` does with threads and a connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.core.events import CheckpointReport, Heartbeat, Registration, RunState, ValidationReport
from shardlane.ids import PROTOCOL_VERSION, Incarnation
from shardlane.member import BEAT_SECONDS_MAX, ENDING_BEAT_SECONDS, RETRY_SECONDS
from shardlane.plan import Plan, Role
from tests.sim.network import Process, RefusedError

if TYPE_CHECKING:
    from tests.sim.coordinator import Reply
    from tests.sim.world import World

_ENDED = (RunState.FINISHED, RunState.FAILED)


class MemberProcess(Process):
    """A shard or a worker."""

    role: Role

    def __init__(self, world: World, incarnation: Incarnation, address: str) -> None:
        super().__init__(incarnation)
        self.world, self.clock, self.network = world, world.clock, world.network
        self.me, self.address = incarnation, address
        self.plan: Plan | None = None  # the newest, whoever told it
        self.state: RunState | None = None
        self.is_leaving = False
        self.has_left = False
        self._is_away = False
        self._beat_number = 0  # of the beat that is due; a sooner one takes its place
        self._reports: deque[CheckpointReport | ValidationReport] = deque()
        self._is_reporting = False

    # ---- for the shard or the worker ----------------------------------------------------------------------------------

    def beat_content(self) -> Heartbeat:
        raise NotImplementedError

    def on_plan(self, plan: Plan) -> None:
        raise NotImplementedError

    def on_reply(self, reply: Reply) -> None:
        raise NotImplementedError

    def on_killed(self) -> None:
        """What others notice at once."""

    # ---- membership ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._register()

    def _register(self) -> None:
        registration = Registration(self.me, self.role, self.address, "sim", "", PROTOCOL_VERSION, "")
        coordinator = self.world.coordinator
        self._call_coordinator(
            lambda: coordinator.register(registration) if coordinator is not None else None,
            lambda _: self.beat_soon(),
            lambda _: self.clock.after(RETRY_SECONDS, self, self._register),
        )

    def offer(self, plan: Plan) -> None:
        """Adopts a plan that is greater than what is known, whoever passes it on."""
        if self.plan is None or plan.number > self.plan.number:
            self.plan = plan
            self.on_plan(plan)
        elif plan.number == self.plan.number and plan is not self.plan and plan.digest != self.plan.digest:
            raise AssertionError(f"two plans are numbered {plan.number}")

    def beat_soon(self) -> None:
        self._plan_beat(0.0)

    def _plan_beat(self, seconds: float) -> None:
        self._beat_number += 1
        number = self._beat_number
        self.clock.after(seconds, self, lambda: self._beat() if number == self._beat_number else None)

    def _beat(self) -> None:
        beat, coordinator, number = self.beat_content(), self.world.coordinator, self._beat_number

        def again(seconds: float) -> None:
            if number == self._beat_number:
                self._plan_beat(seconds)

        def on_reply(reply: Reply) -> None:
            self._is_away, self.state = False, reply.state
            if reply.plan is not None:  # it asks for plans all the while, beside the heartbeats
                self.offer(reply.plan)
            self.on_reply(reply)
            self.has_left = self.has_left or (self.is_leaving and reply.may_leave)
            is_ending = self.is_leaving or reply.state is RunState.FINISHING
            again(ENDING_BEAT_SECONDS if is_ending else BEAT_SECONDS_MAX)

        def on_failure(error: RefusedError | None) -> None:
            if error is not None and error.reason == "unknown member":
                self.world.num["registered again"] += 1
                self._register()
                return
            self._is_away = True
            again(RETRY_SECONDS)

        self._call_coordinator(lambda: coordinator.heartbeat(beat) if coordinator is not None else None, on_reply, on_failure)

    def leave(self) -> None:
        self.is_leaving = True
        self.beat_soon()

    @property
    def run_has_ended(self) -> bool:
        return self.state in _ENDED

    # ---- reports -------------------------------------------------------------------------------------------------------

    def report(self, report: CheckpointReport | ValidationReport) -> None:
        self._reports.append(report)
        if not self._is_reporting:
            self._is_reporting = True
            self._send_report()

    def _send_report(self) -> None:
        if not self._reports:
            self._is_reporting = False
            return
        report, coordinator = self._reports[0], self.world.coordinator

        def on_reply(_: object) -> None:
            self._reports.popleft()
            self._send_report()

        def on_failure(error: RefusedError | None) -> None:
            if error is not None and error.reason == "malformed":
                on_reply(None)
            else:
                self.clock.after(RETRY_SECONDS, self, self._send_report)

        self._call_coordinator(lambda: coordinator.report(report) if coordinator is not None else None, on_reply, on_failure)

    def _call_coordinator(
        self, handle: Callable[[], Any], on_reply: Callable[[Any], None], on_failure: Callable[[RefusedError | None], None]
    ) -> None:
        self.network.call(self, self.world.coordinator, handle, on_reply, on_failure)
