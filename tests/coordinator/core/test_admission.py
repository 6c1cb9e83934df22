"""The gate: one token, one process, one role, until it expires."""

from __future__ import annotations

import pytest

from coordinator.core import admission
from coordinator.core.admission import Gate, Outcome, Verdict
from coordinator.core.events import Fault, TokenUse
from shardlane.join_token import VALID_SECONDS_MAX, mint, readmission
from tests.coordinator.cast import registration

SECRET, NOW = b"s" * 32, 1_800_000_000.0


def token(number: int = 1, *, secret: bytes = SECRET, valid_seconds: int = 600, is_shards: bool = False) -> str:
    role = "shard" if is_shards else "worker"
    return str(mint(secret, role=role, expires_seconds=int(NOW) + valid_seconds, nonce=f"{number:032x}"))  # type: ignore[arg-type]


def judge(gate: Gate, shown: str, *, name: str = "worker 1", address: str = "", now: float = NOW) -> Verdict:
    return gate.judge(registration(name, address=address), shown, secret=SECRET, unix_seconds=now)


def admit(gate: Gate, shown: str, **who: str) -> TokenUse:
    verdict = judge(gate, shown, **who)  # type: ignore[arg-type]
    assert verdict.outcome is Outcome.ADMITTED and verdict.use is not None and verdict.refusal is None
    gate.keep(verdict.use)
    return verdict.use


@pytest.mark.parametrize(
    ("shown", "outcome", "says"),
    [
        ("", Outcome.MISSING, "give --join-token, --join-token-file or --join-secret-file"),
        ("nonsense", Outcome.MALFORMED, "is no join token"),
        (token(secret=b"t" * 32), Outcome.FORGED, "is not signed with this run's secret"),
        (token(is_shards=True), Outcome.WRONG_ROLE, "is for a shard, and was shown by a worker"),
        (token(valid_seconds=-5), Outcome.EXPIRED, "expired 5 s ago"),
        (token(valid_seconds=0), Outcome.EXPIRED, "expired 0 s ago"),
        (token(valid_seconds=VALID_SECONDS_MAX + 1), Outcome.TOO_LONG, "more than 7 days"),
    ],
)
def test_refusals_say_why(shown: str, outcome: Outcome, says: str) -> None:
    verdict = judge(Gate(), shown)
    assert verdict.outcome is outcome and verdict.use is None
    assert verdict.refusal is not None and verdict.refusal.fault is Fault.NOT_ADMITTED and says in verdict.refusal.reason


def test_a_token_lets_in_one_process_however_often_it_asks() -> None:
    gate, shown = Gate(), token()
    admit(gate, shown)
    assert judge(gate, shown).outcome is Outcome.REPEATED
    assert judge(gate, shown, now=NOW + 6000).outcome is Outcome.REPEATED, "its answer may have been lost until it expired"
    for who in ({"name": "worker 2"}, {"address": "elsewhere:1"}):
        verdict = judge(gate, shown, **who)  # type: ignore[arg-type]
        assert verdict.outcome is Outcome.REPLAYED
        assert verdict.refusal is not None and "was used by worker-01" in verdict.refusal.reason


def test_who_was_judged_and_not_kept_leaves_the_token_unused() -> None:
    """As when the rest of its registration is refused."""
    gate, shown = Gate(), token()
    assert judge(gate, shown).outcome is Outcome.ADMITTED
    admit(gate, shown, name="worker 2")


def test_a_restart_forgets_no_use() -> None:
    use = admit(Gate(), token())
    assert judge(Gate([use]), token(), name="worker 2").outcome is Outcome.REPLAYED
    assert judge(Gate([use]), token()).outcome is Outcome.REPEATED


def test_a_readmission_needs_no_memory_and_is_one_processes() -> None:
    who = registration("worker 1")
    shown = readmission(SECRET, role="worker", incarnation=who.incarnation, address=who.address)
    assert judge(Gate(), shown, now=NOW + 10**8) == Verdict(Outcome.READMITTED)
    assert judge(Gate(), shown, name="worker 2").outcome is Outcome.FORGED
    assert judge(Gate(), shown, address="elsewhere:1").outcome is Outcome.FORGED


def test_no_more_uses_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "USES_MAX", 2)
    gate = Gate()
    admit(gate, token(1, valid_seconds=10), name="worker 1")
    admit(gate, token(2), name="worker 2")
    assert judge(gate, token(3), name="worker 3").outcome is Outcome.CROWDED
    assert judge(gate, token(3), name="worker 3", now=NOW + 10).outcome is Outcome.ADMITTED, "the first one has expired"
