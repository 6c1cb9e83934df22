"""Who is a member of the run: leases, registrations, refusals. One is dropped by its lease, its successor, or who saw it dead."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coordinator.core.events import Fault, Heartbeat, Refusal, Registration
from shardlane.ids import PROTOCOL_VERSION, Incarnation, PlanNumber, RunId
from shardlane.plan import Member, Role

_INCARNATION = re.compile(r"(shard|worker)-[0-9a-f]{1,56}")
_ADDRESS = re.compile(r"\S{1,256}:\d{1,5}")
_MEMBERS_MAX = 1 << 16  # a bound on what peers can make the coordinator remember
_BETWEEN_CLASSES = " | shards "
_NO_PLAN = PlanNumber(0, 0)
SILENCE_SECONDS_MIN = 2.0  # nobody is dead sooner by silence alone: busy machines starve heartbeats
_SILENT_BEATS = 4  # of the longest interval of late
_FORGETTING = 0.05  # part of the longest interval that is forgotten with each heartbeat
_STALL_SECONDS = 0.5  # between two looks of the coordinator; beyond it the time is its own standstill


@dataclass(slots=True)
class MemberState:
    """What the coordinator knows of one member."""

    registration: Registration
    lease_end_seconds: float
    heard_seconds: float
    interval_seconds: float = 0.0  # the longest between two heartbeats of late; 0: none came yet
    is_leaving: bool = False
    lane_seconds: float = 0.0  # a worker's, as it told last; 0: not known
    plan: PlanNumber = _NO_PLAN
    version: int = 0
    activity: str = ""

    @property
    def member(self) -> Member:
        return Member(self.registration.incarnation, self.registration.role, self.registration.address)


@dataclass(frozen=True, slots=True)
class Admission:
    """`is_new` is False for a repeated registration; `succeeded`: dead members at whose address the newcomer lives."""

    is_new: bool
    succeeded: tuple[Incarnation, ...] = ()
    warning: str = ""


class Members:
    """In order of registration, which is the order in which places are given."""

    def __init__(
        self, run_id: RunId, *, lease_seconds: float, refuse_other_classes: bool, classes: Mapping[Role, str] | None = None
    ) -> None:
        """`classes`: the numerics class of each role, as far as a checkpoint has fixed it."""
        self.run_id = run_id
        self.lease_seconds = lease_seconds
        self._refuse_other_classes = refuse_other_classes
        self._classes: dict[Role, str] = dict(classes or {})
        self._states: dict[Incarnation, MemberState] = {}
        self._ticked_seconds: float | None = None
        self._awake_seconds = -math.inf  # since when this coordinator has been there without a break

    def __contains__(self, incarnation: str) -> bool:
        return incarnation in self._states

    @property
    def states(self) -> tuple[MemberState, ...]:
        return tuple(self._states.values())

    def alive(self, role: Role) -> tuple[Member, ...]:
        return tuple(state.member for state in self._states.values() if state.registration.role == role)

    @property
    def leaving(self) -> frozenset[Incarnation]:
        """Those that want to go and are still here."""
        return frozenset(state.registration.incarnation for state in self._states.values() if state.is_leaving)

    @property
    def numerics_class(self) -> str:
        """Of the run: the workers', and the shards' if theirs is another."""
        return join_classes(self._classes)

    def restore(self, registrations: Iterable[Registration], now: float) -> None:
        """Members of before this coordinator's start: a lease of grace, within which they speak up or are dead."""
        self._awake_seconds = now
        for each in registrations:
            self._states[each.incarnation] = MemberState(each, now + 2 * self.lease_seconds, now)
            self._classes.setdefault(each.role, each.numerics_class)

    def register(self, registration: Registration, now: float) -> Admission | Refusal:
        if (refusal := self._judge(registration)) is not None:
            return refusal
        known = self._states.get(registration.incarnation)
        if known is not None:
            if known.member != Member(registration.incarnation, registration.role, registration.address):
                found = f"{known.registration.role} at {known.registration.address}"
                return Refusal(
                    Fault.MALFORMED, f"{registration.incarnation} is registered as {found}; choose another incarnation"
                )
            self._renew(known, now)
            return Admission(is_new=False)
        succeeded = tuple(each.member.incarnation for each in self.states if each.registration.address == registration.address)
        for incarnation in succeeded:  # an address has one process: the older one is dead
            del self._states[incarnation]
        warning = ""
        expected = self._classes.setdefault(registration.role, registration.numerics_class)
        if expected != registration.numerics_class:
            warning = f"{registration.incarnation} is of numerics class {registration.numerics_class!r}, the run of {expected!r}"
        self._states[registration.incarnation] = MemberState(registration, now + self.lease_seconds, now)
        return Admission(True, succeeded, warning)

    def _judge(self, registration: Registration) -> Refusal | None:
        incarnation, role = registration.incarnation, registration.role
        if registration.protocol_version != PROTOCOL_VERSION:
            return Refusal(Fault.INCOMPATIBLE, protocol_mismatch(registration.protocol_version))
        if registration.run_id not in ("", self.run_id):
            return Refusal(Fault.INCOMPATIBLE, wrong_run(registration.run_id, self.run_id))
        if not _INCARNATION.fullmatch(incarnation) or not incarnation.startswith(role):
            return Refusal(Fault.MALFORMED, f"incarnation {incarnation[:64]!r} is not {role}- and random hex digits")
        if not _ADDRESS.fullmatch(registration.address):
            return Refusal(Fault.MALFORMED, f"{incarnation} gives the address {registration.address[:64]!r}; expected host:port")
        expected = self._classes.get(role, registration.numerics_class)
        if self._refuse_other_classes and expected != registration.numerics_class:
            return Refusal(
                Fault.INCOMPATIBLE,
                f"{incarnation} is of numerics class {registration.numerics_class!r}, the run of {expected!r};"
                ' numerics.determinism = "strict" refuses the mix, "warn" would only report it',
            )
        if len(self._states) >= _MEMBERS_MAX and incarnation not in self._states:
            return Refusal(Fault.INCOMPATIBLE, f"the run has {_MEMBERS_MAX} members, which is the most it takes")
        return None

    def heartbeat(self, beat: Heartbeat, now: float) -> MemberState | Refusal:
        state = self._states.get(beat.incarnation)
        if state is None:
            return Refusal(Fault.UNKNOWN_MEMBER, f"{beat.incarnation} is no member: register again")
        self._renew(state, now)
        state.plan, state.version, state.activity = beat.plan, beat.version, beat.activity[:64]
        state.is_leaving = state.is_leaving or beat.is_leaving
        state.lane_seconds = max(0.0, beat.lane_seconds) or state.lane_seconds
        return state

    def _renew(self, state: MemberState, now: float) -> None:
        """The lease is measured: a few of the member's own intervals, between `SILENCE_SECONDS_MIN` and `lease_seconds`."""
        interval, longest = now - state.heard_seconds, state.interval_seconds
        is_late = self._ticked_seconds is not None and now - self._ticked_seconds > _STALL_SECONDS
        if state.heard_seconds > self._awake_seconds and not is_late:  # else it is our own absence that would be measured
            state.interval_seconds = max(interval, longest - _FORGETTING * (longest - interval))
        state.heard_seconds = now
        measured = max(SILENCE_SECONDS_MIN, _SILENT_BEATS * state.interval_seconds)
        state.lease_end_seconds = now + (min(self.lease_seconds, measured) if state.interval_seconds else self.lease_seconds)

    def drop(self, incarnation: Incarnation) -> bool:
        """Whether it was a member. One that lives nevertheless registers again."""
        return self._states.pop(incarnation, None) is not None

    def plan(self, incarnation: Incarnation) -> PlanNumber:
        """The newest that a member has adopted."""
        return self._states[incarnation].plan

    def address(self, incarnation: Incarnation) -> str | None:
        """host:port of a member."""
        state = self._states.get(incarnation)
        return None if state is None else state.registration.address

    def expire(self, now: float) -> tuple[tuple[Incarnation, float], ...]:
        """Drops the silent; for how many seconds each was. While the coordinator itself stood still nobody was silent."""
        before, self._ticked_seconds = self._ticked_seconds, now
        if before is not None and (gap := now - before) > _STALL_SECONDS:
            self._awake_seconds = now
            for state in self._states.values():
                state.lease_end_seconds += gap
        silent = tuple(
            (incarnation, now - state.heard_seconds)
            for incarnation, state in self._states.items()
            if state.lease_end_seconds < now
        )
        for incarnation, _ in silent:
            del self._states[incarnation]
        return silent


def join_classes(classes: Mapping[Role, str]) -> str:
    worker, shard = classes.get("worker", ""), classes.get("shard", "")
    return worker if worker == shard else f"{worker}{_BETWEEN_CLASSES}{shard}"


def split_classes(numerics_class: str) -> dict[Role, str]:
    """The inverse of `join_classes`."""
    worker, separator, shard = numerics_class.partition(_BETWEEN_CLASSES)
    return {"worker": worker, "shard": shard if separator else worker} if numerics_class else {}


def protocol_mismatch(found: int) -> str:
    return f"the sender speaks protocol version {found}, this coordinator {PROTOCOL_VERSION}; run the same Shardlane on both"


def wrong_run(found: str, expected: str) -> str:
    return f"the sender means run {found[:64]!r}, this coordinator runs {expected!r}; check the coordinator's address"
