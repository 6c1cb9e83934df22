"""Who may steer the run by the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.core.events import Control
from coordinator.core.steering import BURST, Allowance, Attempt, Outcome, Steering, is_named_rightly

TOKEN = b"t" * 32
GOOD = Attempt(
    has_header=True,
    origin="http://127.0.0.1:8080",
    host="127.0.0.1:8080",
    authorization=f"Bearer {TOKEN.decode()}",
    body=b'{"action": "pause"}',
)


def test_what_is_right_is_accepted() -> None:
    verdict = Steering().judge(GOOD, TOKEN, 0.0)
    assert (verdict.outcome, verdict.status, verdict.action) == (Outcome.ACCEPTED, 200, Control.PAUSE)
    assert Steering().judge(replace(GOOD, origin=""), TOKEN, 0.0).action is Control.PAUSE, "no browser names no origin"


@pytest.mark.parametrize(
    ("changes", "outcome", "status"),
    [
        ({"has_header": False}, Outcome.CROSS_SITE, 403),
        ({"origin": "http://evil.example"}, Outcome.CROSS_SITE, 403),
        ({"origin": "null"}, Outcome.CROSS_SITE, 403),
        ({"authorization": ""}, Outcome.WRONG_TOKEN, 401),
        ({"authorization": "Bearer " + "t" * 31}, Outcome.WRONG_TOKEN, 401),
        ({"authorization": "Bearer tökén"}, Outcome.WRONG_TOKEN, 401),
        ({"authorization": "Basic " + "t" * 32}, Outcome.WRONG_TOKEN, 401),
        ({"body": b""}, Outcome.MALFORMED, 400),
        ({"body": b"\xff"}, Outcome.MALFORMED, 400),
        ({"body": b"[" * 1000}, Outcome.MALFORMED, 400),
        ({"body": b'["pause"]'}, Outcome.MALFORMED, 400),
        ({"body": b'{"action": "explode"}'}, Outcome.MALFORMED, 400),
        ({"body": b'{"action": ["pause"]}'}, Outcome.MALFORMED, 400),
        ({"body": b'{"action": "pause", "more": 1}'}, Outcome.MALFORMED, 400),
    ],
)
def test_all_else_is_refused(changes: dict[str, Any], outcome: Outcome, status: int) -> None:
    verdict = Steering().judge(replace(GOOD, **changes), TOKEN, 0.0)
    assert (verdict.outcome, verdict.status, verdict.action) == (outcome, status, None)


def test_without_a_token_control_is_off() -> None:
    assert Steering().judge(GOOD, None, 0.0).outcome is Outcome.OFF


def test_a_flood_of_wrong_tokens_is_bounded_and_locks_nobody_out() -> None:
    steering, wrong = Steering(), replace(GOOD, authorization="Bearer x")
    outcomes = [steering.judge(wrong, TOKEN, 100.0).outcome for _ in range(BURST + 5)]
    assert outcomes == [Outcome.WRONG_TOKEN] * BURST + [Outcome.TOO_MANY] * 5
    assert steering.judge(GOOD, TOKEN, 100.0).outcome is Outcome.ACCEPTED
    assert steering.judge(wrong, TOKEN, 101.0).outcome is Outcome.WRONG_TOKEN


def test_an_accepted_flood_is_bounded_too() -> None:
    steering = Steering()
    verdicts = [steering.judge(GOOD, TOKEN, 100.0) for _ in range(BURST + 1)]
    assert verdicts[-1].outcome is Outcome.TOO_MANY and verdicts[-1].action is None and verdicts[-1].status == 429


def test_an_allowance_never_saves_up_more_than_its_burst() -> None:
    allowance = Allowance(2, 1.0)
    assert [allowance.take(1000.0) for _ in range(3)] == [True, True, False]
    assert [allowance.take(1001.0) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("host", "is_right"),
    [
        ("127.0.0.1:8080", True), ("localhost", True), ("localhost:1", True), ("[::1]:80", True), ("127.0.0.1", True),
        ("evil.example", False), ("evil.example:8080", False), ("127.evil.example:1", False), ("", False),
        ("localhost.evil", False),
    ],
)  # fmt: skip
def test_a_name_that_somebody_points_at_loopback_is_none_of_ours(host: str, is_right: bool) -> None:
    assert is_named_rightly(host, is_loopback=True) is is_right
    assert is_named_rightly(host, is_loopback=False)
