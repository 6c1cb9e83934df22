"""Leases, and who is refused."""

from __future__ import annotations

import pytest

from coordinator.core.events import Fault, Heartbeat, Refusal
from coordinator.core.membership import Admission, Members, join_classes, split_classes
from shardlane.ids import PlanNumber, Version
from tests.coordinator.cast import CPU, RUN, incarnation, registration


def members(*, strict: bool = False) -> Members:
    return Members(RUN, lease_seconds=4.0, refuse_other_classes=strict)


def heartbeat(name: str) -> Heartbeat:
    return Heartbeat(incarnation(name), PlanNumber(1, 1), Version(3), activity="x" * 99)


def first_expiry(each: Members, begin: float) -> float:
    """When somebody is dropped first, to a tick of the coordinator's."""
    now = begin
    while not each.expire(now):
        assert now < begin + 60.0
        now += 0.1
    return now


@pytest.mark.parametrize(
    ("interval_seconds", "patience_seconds"),
    [(0.25, 2.0), (0.8, 3.2), (2.0, 4.0)],
    ids=["no sooner than 2 s", "four of its own intervals", "no later than the lease"],
)
def test_a_silent_members_lease_is_measured_by_its_own_heartbeats(interval_seconds: float, patience_seconds: float) -> None:
    each = members()
    each.register(registration("worker 1"), 0.0)
    now = 0.0
    for _ in range(20):
        now += interval_seconds
        each.heartbeat(heartbeat("worker 1"), now)
    assert first_expiry(each, now) == pytest.approx(now + patience_seconds, abs=0.11)
    answer = each.heartbeat(heartbeat("worker 1"), now + 5.0)
    assert isinstance(answer, Refusal) and answer.fault is Fault.UNKNOWN_MEMBER
    assert each.register(registration("worker 1"), now + 5.1) == Admission(True)  # suspected by mistake: back at once


def test_a_machine_that_starves_is_given_more_time_for_a_while() -> None:
    each = Members(RUN, lease_seconds=10.0, refuse_other_classes=False)
    each.register(registration("worker 1"), 0.0)
    now = 0.0
    for interval in [0.5] * 10 + [1.5]:
        now += interval
        each.heartbeat(heartbeat("worker 1"), now)
    assert first_expiry(each, now) == pytest.approx(now + 6.0, abs=0.11)
    each.register(registration("worker 1"), now + 7.0)
    for _ in range(60):
        now += 0.5
        each.expire(now + 7.0)
        each.heartbeat(heartbeat("worker 1"), now + 7.0)
    assert first_expiry(each, now + 7.0) < now + 7.0 + 3.0


def test_a_break_of_the_coordinators_own_is_not_measured_as_a_members() -> None:
    each = Members(RUN, lease_seconds=10.0, refuse_other_classes=False)
    each.restore([registration("worker 1")], 100.0)  # another life of the coordinator; members need a while to find it
    each.expire(100.1)
    now = 102.5
    for begin, beats in ((102.5, 8), (110.0, 8)):  # then it hangs for 3.5 s
        now = begin
        for _ in range(beats):
            each.heartbeat(heartbeat("worker 1"), now)
            each.expire(now + 0.01)
            now += 0.5
    last = now - 0.5
    assert first_expiry(each, last + 0.01) == pytest.approx(last + 2.0, abs=0.11)


def test_time_in_which_the_coordinator_stood_still_is_nobodys_silence() -> None:
    each = members()
    each.register(registration("worker 1"), 0.0)
    each.expire(0.1)
    assert first_expiry(each, 60.0) == pytest.approx(60.0 + 3.9, abs=0.11)


def test_a_repeated_registration_is_harmless() -> None:
    each = members()
    assert each.register(registration("worker 1"), 0.0) == Admission(True)
    assert each.register(registration("worker 1"), 1.0) == Admission(False)
    assert len(each.states) == 1
    answer = each.register(registration("worker 1", address="other:1"), 1.0)
    assert isinstance(answer, Refusal) and "worker1.local:50051" in answer.reason


def test_a_newcomer_at_an_address_means_that_the_older_one_is_dead() -> None:
    each = members()
    each.register(registration("worker 1", address="host:1"), 0.0)
    assert each.register(registration("worker 2", address="host:1"), 0.1) == Admission(True, (incarnation("worker 1"),))
    assert [member.incarnation for member in each.alive("worker")] == [incarnation("worker 2")]


def test_another_protocol_run_or_form_is_refused_by_name() -> None:
    each = members()
    wrong = {
        "protocol version 99": registration("worker 1", protocol_version=99),
        "run 'other'": registration("worker 1", run_id="other"),
        "'worker 1'": registration("worker 1", incarnation="worker 1"),
        "'shard-01'": registration("worker 1", incarnation="shard-01"),
        "'nowhere'": registration("worker 1", address="nowhere"),
    }
    for found, each_registration in wrong.items():
        answer = each.register(each_registration, 0.0)
        assert isinstance(answer, Refusal) and found in answer.reason
    assert each.states == ()
    assert each.register(registration("worker 1", run_id=RUN), 0.0) == Admission(True)


def test_another_numerics_class_is_reported_or_refused() -> None:
    for strict in (False, True):
        each = members(strict=strict)
        each.register(registration("worker 1"), 0.0)
        each.register(registration("shard 1", numerics_class="a gpu"), 0.0)  # roles differ without harm
        answer = each.register(registration("worker 2", numerics_class="a gpu"), 0.0)
        if strict:
            assert isinstance(answer, Refusal) and answer.fault is Fault.INCOMPATIBLE and "'a gpu'" in answer.reason
        else:
            assert isinstance(answer, Admission) and "'a gpu'" in answer.warning
        assert each.numerics_class == f"{CPU} | shards a gpu"


def test_classes_are_split_as_they_were_joined() -> None:
    assert split_classes(join_classes({"worker": CPU, "shard": CPU})) == {"worker": CPU, "shard": CPU}
    assert split_classes(join_classes({"worker": "a gpu", "shard": CPU})) == {"worker": "a gpu", "shard": CPU}
    assert split_classes("") == {}


def test_restored_members_have_time_to_speak_up() -> None:
    each = members()
    each.restore([registration("shard 1")], now=100.0)
    assert first_expiry(each, 100.0) == pytest.approx(108.0, abs=0.11)


def test_what_people_read_is_bounded() -> None:
    each = members()
    each.register(registration("worker 1"), 0.0)
    each.heartbeat(heartbeat("worker 1"), 1.0)
    (state,) = each.states
    assert (state.plan, state.version, len(state.activity)) == (PlanNumber(1, 1), 3, 64)
