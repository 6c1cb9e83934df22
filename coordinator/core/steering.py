"""Run control by the status page: who may ask for what. A pure decision of one request; the token comes from outside.

A browser sends what any page asks it to, so a request must carry a header that only our own page may set (others would have to
ask first, by CORS, and are not answered), and come from our own origin where the browser names one.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus

from coordinator.core.events import Control

BODY_BYTES_MAX = 1024
HEADER = "X-Shardlane-Control"
BURST = 10  # attempts at once, of the accepted and of the refused each
PER_SECOND = 1.0  # thereafter


class Outcome(Enum):
    """How an attempt fared: a metric's label."""

    ACCEPTED = "accepted"
    OFF = "off"
    CROSS_SITE = "cross_site"
    WRONG_TOKEN = "wrong_token"
    MALFORMED = "malformed"
    TOO_MANY = "too_many"


@dataclass(frozen=True, slots=True)
class Attempt:
    has_header: bool
    origin: str  # of the page that asks; empty: no browser, or one that does not say
    host: str  # that was asked
    authorization: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    status: HTTPStatus
    reason: str  # for people
    action: Control | None = None  # to be done


class Allowance:
    """So many at once, then so many a second."""

    def __init__(self, burst: int = BURST, per_second: float = PER_SECOND) -> None:
        self._burst, self._per_second = burst, per_second
        self._left = float(burst)
        self._seen_seconds = 0.0

    def take(self, now: float) -> bool:
        self._left = min(self._burst, self._left + (now - self._seen_seconds) * self._per_second)
        self._seen_seconds = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Steering:
    """Two allowances: a flood of refused attempts locks out nobody who has the token."""

    def __init__(self) -> None:
        self._accepted, self._refused = Allowance(), Allowance()

    def judge(self, attempt: Attempt, token: bytes | None, now: float) -> Verdict:
        """`token`: None: control is off."""
        verdict = _judge(attempt, token)
        is_accepted = verdict.outcome is Outcome.ACCEPTED
        if (self._accepted if is_accepted else self._refused).take(now):
            return verdict
        reason = f"too many attempts; {PER_SECOND:g} a second is the most"
        return Verdict(Outcome.TOO_MANY, HTTPStatus.TOO_MANY_REQUESTS, reason)


def _judge(attempt: Attempt, token: bytes | None) -> Verdict:
    if token is None:
        reason = "run control is off here; start the coordinator with --control-token-file, or use `shardlane pause` and its like"
        return Verdict(Outcome.OFF, HTTPStatus.FORBIDDEN, reason)
    if not attempt.has_header or (attempt.origin and attempt.origin not in (f"http://{attempt.host}", f"https://{attempt.host}")):
        return Verdict(Outcome.CROSS_SITE, HTTPStatus.FORBIDDEN, f"run control is for this page alone, with the header {HEADER}")
    scheme, _, shown = attempt.authorization.partition(" ")
    if not hmac.compare_digest(shown.strip().encode(errors="replace"), token) or scheme.lower() != "bearer":
        return Verdict(Outcome.WRONG_TOKEN, HTTPStatus.UNAUTHORIZED, "the token is not the one in the coordinator's file")
    known = {action.value: action for action in Control}
    try:
        values = json.loads(attempt.body)
        action = known.get(str(values["action"])) if isinstance(values, dict) and values.keys() == {"action"} else None
    except (ValueError, RecursionError):
        action = None
    if action is None:
        reason = f'expected {{"action": "…"}} with one of {", ".join(known)}'
        return Verdict(Outcome.MALFORMED, HTTPStatus.BAD_REQUEST, reason)
    return Verdict(Outcome.ACCEPTED, HTTPStatus.OK, f"asked to {action.value}", action)


def is_named_rightly(host: str, *, is_loopback: bool) -> bool:
    """Whether a request's Host is one that this server has. A name that somebody has pointed at loopback is none: by that a page
    of theirs would count as ours. Where others reach the server, its names are for them to know.
    """
    if not is_loopback:
        return True
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name == "localhost" or name == "[::1]" or (name.startswith("127.") and name.replace(".", "").isdigit())
