"""What has happened under this coordinator, for people: events, checkpoints, and what part of the time made steps that count."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from coordinator.core.events import CheckpointFailed, Effect, Note, RunState, TrainingRow
from shardlane.ids import Version

EVENTS_MAX = 256
CHECKPOINTS_MAX = 16
STEPS_MAX = 128  # whose time is the usual one
RECENT_STEPS = 32  # over which speed is taken
_TEXT_MAX = 300
_COUNTED = (RunState.GATHERING, RunState.TRAINING, RunState.FINISHING)  # time in which it was to train


@dataclass(frozen=True, slots=True)
class Event:
    unix_seconds: float
    text: str
    is_warning: bool


class History:
    """Every ring is bounded. Fed with each effect, and with the run's state after each."""

    def __init__(self, begun: Event) -> None:
        """`begun`: that this coordinator has begun, which people see where the events of an earlier one were."""
        self.events: deque[Event] = deque([begun], maxlen=EVENTS_MAX)
        self.checkpoints: deque[tuple[Version, float]] = deque(maxlen=CHECKPOINTS_MAX)  # version, unix seconds; 0: of before
        self._paces: deque[tuple[int, float]] = deque(maxlen=STEPS_MAX)  # tokens, seconds
        self._begin_version: Version | None = None  # when it first was to train
        self._seen_seconds = 0.0
        self._was_counted = False
        self._counted_seconds = 0.0

    def take(self, effect: Effect, unix_seconds: float) -> None:
        match effect:
            case Note(text, is_warning):
                self.events.append(Event(unix_seconds, text[:_TEXT_MAX], is_warning))
            case CheckpointFailed(version, reason):
                self.events.append(Event(unix_seconds, f"no checkpoint of version {version}: {reason}"[:_TEXT_MAX], True))
            case TrainingRow(summary, tokens_per_second) if tokens_per_second > 0:
                self._paces.append((summary.tokens, summary.tokens / tokens_per_second))
            case TrainingRow() if self._begin_version is not None:  # of a time that is not known: not under this coordinator
                self._begin_version = Version(self._begin_version + 1)
            case _:
                pass

    def observe(self, state: RunState, version: Version, checkpoint: Version, now: float, unix_seconds: float) -> None:
        """How the run stands at `now`, of a steady clock."""
        is_first = self._begin_version is None
        if checkpoint and (not self.checkpoints or self.checkpoints[-1][0] != checkpoint):
            self.checkpoints.append((checkpoint, 0.0 if is_first else unix_seconds))
        if is_first and state is RunState.TRAINING:
            self._begin_version, self._seen_seconds = version, now
        if self._begin_version is not None and self._was_counted:
            self._counted_seconds += now - self._seen_seconds
        self._seen_seconds = now
        self._was_counted = self._begin_version is not None and state in _COUNTED

    @property
    def tokens_per_second(self) -> float:
        """Over the newest steps; 0: not known."""
        recent = list(self._paces)[-RECENT_STEPS:]
        seconds = sum(seconds for _, seconds in recent)
        return sum(tokens for tokens, _ in recent) / seconds if seconds else 0.0

    def goodput(self, version: Version) -> tuple[float, float]:
        """(part, tokens a second) of the time since it first trained, pauses left out: the part that the steps that count would
        have taken at the median pace, and their tokens over it. What a roll-back undid does not count. Zeros: not known.
        """
        if not self._paces or self._begin_version is None or self._counted_seconds <= 0:
            return 0.0, 0.0
        num_steps = max(0, version - self._begin_version)
        usual_seconds = median(seconds for _, seconds in self._paces)
        tokens = self._paces[-1][0]
        return min(1.0, num_steps * usual_seconds / self._counted_seconds), num_steps * tokens / self._counted_seconds
