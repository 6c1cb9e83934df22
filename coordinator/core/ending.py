"""What was asked of the run, and the version at which it ends."""

from __future__ import annotations

from coordinator.core.beginning import Saved
from coordinator.core.events import CheckpointMark
from shardlane.ids import Version
from shardlane.plan import DONE, REQUEST_CHECKPOINT, REQUEST_STOP
from shardlane.train_config import TrainConfig


class Ending:
    """`requests`: REQUEST_* bits for the next record to close. `version`: where the run ends, once a decision has said so."""

    def __init__(self, train: TrainConfig, saved: Saved, checkpoint: CheckpointMark, version: Version) -> None:
        self.requests, self.version, self.is_done = saved.requests, saved.end_version, saved.done
        self._train = train
        self._asked_at = version  # for a checkpoint
        if checkpoint.clocks and sum(checkpoint.clocks) >= train.last_version:
            self.version, self.is_done = checkpoint.version, True

    def expected(self, present: Version) -> Version:
        """Where the run ends, as far as can be known at `present`; under ASP no sooner than a decision says so."""
        if self.version is not None:
            return self.version
        return Version(max(self._train.last_version, present + 1) if self._train.goes_by_turns else self._train.last_step)

    def is_last(self, version: Version) -> bool:
        """Whether it is the last of the whole run, not one where it was stopped."""
        return self.is_done or (version >= self._train.last_step and not self._train.goes_by_turns)

    def ask(self, request: int, present: Version) -> None:
        self.requests |= request
        self._asked_at = present if request == REQUEST_CHECKPOINT else self._asked_at

    def answered(self, checkpoint: Version) -> None:
        """A checkpoint of this version is being taken."""
        if checkpoint > self._asked_at:
            self.requests &= ~REQUEST_CHECKPOINT

    def take_effect(self, requests: int, version: Version) -> None:
        """The bits of the decision that leads to `version`."""
        if requests & (REQUEST_CHECKPOINT | REQUEST_STOP):
            self.requests &= ~REQUEST_CHECKPOINT
        if requests & (REQUEST_STOP | DONE):
            self.requests &= ~REQUEST_STOP
            self.version, self.is_done = version, bool(requests & DONE)

    def rewind(self, version: Version, *, is_suspending: bool) -> None:
        """14. The steps from `version` on are lost, and with them a stop: it is asked for again, unless others go on."""
        if is_suspending:
            self.version, self.is_done = None, False
            self.requests &= ~REQUEST_STOP
        if self.version is not None and self.version > version:
            self.requests |= 0 if self.is_done else REQUEST_STOP
            self.version, self.is_done = None, False
