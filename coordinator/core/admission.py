"""Who is let in: join tokens, each good once, until it expires, for one role. Time and the secret come from outside.

A token that was used stays bound to who used it, so that the same process may say it again after a lost answer. After that it has
a readmission of its own, which needs no memory here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from coordinator.core.events import Fault, Refusal, Registration, TokenUse
from shardlane import join_token

USES_MAX = 1 << 16  # remembered at a time; each is of a token that was signed


class Outcome(Enum):
    """How a registration fared at the gate: a metric's label."""

    ADMITTED = "admitted"
    REPEATED = "repeated"  # the same process with the same token
    READMITTED = "readmitted"
    MISSING = "missing"
    MALFORMED = "malformed"
    FORGED = "forged"
    WRONG_ROLE = "wrong_role"
    EXPIRED = "expired"
    TOO_LONG = "too_long"
    REPLAYED = "replayed"
    CROWDED = "crowded"


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    use: TokenUse | None = None  # to be kept, if the rest of the registration is found good
    refusal: Refusal | None = None


class Gate:
    """Remembers the tokens that were used and have not expired."""

    def __init__(self, uses: Iterable[TokenUse] = ()) -> None:
        self._uses = {use.nonce: use for use in uses}

    def judge(self, registration: Registration, shown: str, *, secret: bytes, unix_seconds: float) -> Verdict:
        """Changes nothing: a use is told to `keep` once the rest of the registration is found good, too."""
        role, who, address = registration.role, registration.incarnation, registration.address
        if not shown:
            reason = "this run takes newcomers with a join token only; give --join-token, --join-token-file or --join-secret-file"
            return _refused(Outcome.MISSING, reason)
        if join_token.claims_readmission(shown):
            if join_token.is_readmission(shown, secret, role=role, incarnation=who, address=address):
                return Verdict(Outcome.READMITTED)
            return _refused(Outcome.FORGED, "the readmission is another process's, or the secret has changed; join anew")
        token = join_token.parse(shown)
        if token is None:
            return _refused(Outcome.MALFORMED, "what was shown is no join token; `shardlane join-token` makes one")
        if not token.is_signed_with(secret):
            return _refused(Outcome.FORGED, "the join token is not signed with this run's secret; have one made with it")
        if token.role != role:
            return _refused(Outcome.WRONG_ROLE, f"the join token is for a {token.role}, and was shown by a {role}")
        use = self._uses.get(token.nonce)
        if use is not None and (use.incarnation, use.address) == (who, address):
            return Verdict(Outcome.REPEATED)
        if use is not None:
            return _refused(Outcome.REPLAYED, f"the join token was used by {use.incarnation}; each is good for one process")
        left_seconds = token.expires_seconds - unix_seconds
        if left_seconds <= 0:
            reason = f"the join token expired {abs(left_seconds):.0f} s ago by the coordinator's clock; have a new one made"
            return _refused(Outcome.EXPIRED, reason)
        if left_seconds > join_token.VALID_SECONDS_MAX:
            most = join_token.VALID_SECONDS_MAX // 86_400
            return _refused(Outcome.TOO_LONG, f"the join token is good for more than {most} days by the coordinator's clock")
        self._forget_expired(unix_seconds)
        if len(self._uses) >= USES_MAX:
            return _refused(Outcome.CROWDED, f"{USES_MAX} join tokens are in use; try again when some have expired")
        return Verdict(Outcome.ADMITTED, TokenUse(token.nonce, who, address, token.expires_seconds))

    def keep(self, use: TokenUse) -> None:
        self._uses[use.nonce] = use

    def _forget_expired(self, unix_seconds: float) -> None:
        self._uses = {nonce: use for nonce, use in self._uses.items() if use.expires_seconds > unix_seconds}


def _refused(outcome: Outcome, reason: str) -> Verdict:
    return Verdict(outcome, refusal=Refusal(Fault.NOT_ADMITTED, reason))
