"""Join tokens: one sentence, signed with the run's secret, that admits one newcomer of one role until it expires.

`shardlane-join.1.ROLE.EXPIRES.NONCE.MAC`: unix seconds, 32 hex digits, and HMAC-SHA-256 over all that comes before it. A
readmission is `shardlane-again.1.MAC`, over who was admitted: it is good for that one life of a process, for as long as the
secret is.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass

from shardlane.errors import UserError
from shardlane.plan import Role

CHARACTERS_MAX = 256  # of anything that is shown as a token
VALID_SECONDS_MAX = 7 * 86_400  # a used token is remembered until it expires

_JOIN = re.compile(r"(shardlane-join\.1\.(shard|worker)\.(\d{1,12})\.([0-9a-f]{32}))\.([0-9a-f]{64})", re.ASCII)
_AGAIN = "shardlane-again.1"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class JoinToken:
    role: Role
    expires_seconds: int  # unix time
    nonce: str  # 32 hex digits
    mac: str

    @property
    def _said(self) -> str:
        return f"shardlane-join.1.{self.role}.{self.expires_seconds}.{self.nonce}"

    def __str__(self) -> str:
        return f"{self._said}.{self.mac}"

    def is_signed_with(self, secret: bytes) -> bool:
        """In constant time."""
        return hmac.compare_digest(self.mac, _mac(secret, self._said))


def mint(secret: bytes, *, role: Role, expires_seconds: int, nonce: str) -> JoinToken:
    """`nonce`: 32 hex digits that were never used before."""
    unsigned = JoinToken(role, expires_seconds, nonce, "")
    return JoinToken(role, expires_seconds, nonce, _mac(secret, unsigned._said))


def parse(text: str) -> JoinToken | None:
    """None for what is no join token; whether it is a true one is another question."""
    found = _JOIN.fullmatch(text) if len(text) <= CHARACTERS_MAX else None
    if found is None:
        return None
    role: Role = "shard" if found[2] == "shard" else "worker"
    token = JoinToken(role, int(found[3]), found[4], found[5])
    return token if str(token) == text else None  # one spelling: no leading zeros


def readmission(secret: bytes, *, role: Role, incarnation: str, address: str) -> str:
    """What admits a member again that was admitted once."""
    return f"{_AGAIN}.{_mac(secret, f'{_AGAIN} {role} {incarnation} {address}')}"


def is_readmission(text: str, secret: bytes, *, role: Role, incarnation: str, address: str) -> bool:
    """In constant time."""
    expected = readmission(secret, role=role, incarnation=incarnation, address=address)
    return hmac.compare_digest(text.encode(errors="replace"), expected.encode())


def claims_readmission(text: str) -> bool:
    return text.startswith(f"{_AGAIN}.")


def seconds_of(text: str) -> int:
    """`90s`, `10m`, `2h` or `7d`. Raises `UserError`."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise UserError(f"found the time {text!r}; expected a number with s, m, h or d, such as 10m")
    seconds = int(number) * _UNITS[unit]
    if not 1 <= seconds <= VALID_SECONDS_MAX:
        raise UserError(f"found the time {text!r}; a join token is good for 1 s to {VALID_SECONDS_MAX // 86_400} d")
    return seconds


def _mac(secret: bytes, said: str) -> str:
    return hmac.new(secret, said.encode(), hashlib.sha256).hexdigest()
