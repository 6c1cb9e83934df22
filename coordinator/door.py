"""Where newcomers show their join tokens: the gate, with the run's secret, the clock on the wall, and a metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from coordinator.core.admission import Gate, Outcome
from coordinator.core.events import Effect, Note, Refusal, Registration, TokenUse
from shardlane.errors import UserError
from shardlane.join_token import readmission
from shardlane.metrics import Metrics
from shardlane.secret_file import read_secret


class Door:
    """Open to everybody where there is no secret. For one thread at a time."""

    def __init__(
        self,
        secret_file: Path | None,
        uses: Iterable[TokenUse],
        metrics: Metrics,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises `UserError` for a secret that cannot be read."""
        self._file = secret_file
        self._secret = b"" if secret_file is None else read_secret(secret_file)
        self._gate = Gate(uses)
        self._unix_clock = unix_clock
        self._joins = metrics.counter(
            "shardlane_coordinator_admissions_total", "Registrations at the door, by token.", ("outcome",)
        )
        for outcome in Outcome if secret_file is not None else ():
            self._joins.labels(outcome.value)  # a rate needs the zero before the first one

    def admit(
        self, registration: Registration, shown: str, register: Callable[[], tuple[Refusal | None, list[Effect]]]
    ) -> tuple[Refusal | None, list[Effect]]:
        """`register` if the token is good; what it uses is kept unless that refuses, and before its effects."""
        if self._file is None:
            return register()
        with suppress(UserError):  # in the midst of being replaced: as it was
            self._secret = read_secret(self._file)
        verdict = self._gate.judge(registration, shown, secret=self._secret, unix_seconds=self._unix_clock())
        self._joins.labels(verdict.outcome.value).inc()
        if verdict.refusal is not None:
            return verdict.refusal, [Note(f"refused: {verdict.refusal.reason}", is_warning=True)]
        refusal, effects = register()
        if refusal is not None or verdict.use is None:
            return refusal, effects
        self._gate.keep(verdict.use)
        return None, [verdict.use, *effects]

    def readmission(self, registration: Registration) -> str:
        """For who has been admitted; empty where nobody needs one."""
        if self._file is None:
            return ""
        return readmission(
            self._secret, role=registration.role, incarnation=registration.incarnation, address=registration.address
        )
