"""What a coordinator takes a run up with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.core.events import NO_CHECKPOINT, CheckpointMark, Registration
from shardlane.ids import RunId, Timeline, Version
from shardlane.plan import Plan, Role


@dataclass(frozen=True, slots=True)
class Saved:
    """What a restarted coordinator must know besides plan, members and reports."""

    paused: bool = False
    requests: int = 0  # REQUEST_* bits that were asked for and have not taken effect
    end_version: Version | None = None  # where a stop took effect
    finished: bool = False
    done: bool = False  # it is the run's last, which under ASP only a decision tells
    suspending: bool = False  # that stop is one of shards that all leave: the run goes on when others come


@dataclass(frozen=True)
class Beginning:
    """Where a coordinator takes up a run: fresh, resumed from a checkpoint, or in the middle after a restart."""

    run_id: RunId
    term: int
    timeline: Timeline  # the plan's, or that of the first plan
    plan: Plan | None = None
    version: Version = NO_CHECKPOINT.version  # summaries of all steps below it are kept
    checkpoint: CheckpointMark = NO_CHECKPOINT
    validations: Mapping[Version, float] = field(default_factory=dict)
    registrations: tuple[Registration, ...] = ()
    classes: Mapping[Role, str] = field(default_factory=dict)
    saved: Saved = Saved()
