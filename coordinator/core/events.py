"""What comes into the core and what it asks of its shell. Values only; `coordinator.proto` is the wire format of the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal, get_args

from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Step, Version
from shardlane.plan import Plan, Role
from shardlane.tally import Tally


class RunState(IntEnum):
    """The numbers are those of the wire."""

    GATHERING = 1
    TRAINING = 2
    PAUSED = 3
    FINISHING = 4
    FINISHED = 5
    FAILED = 6


class Control(Enum):
    PAUSE = "pause"
    RESUME = "resume"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


# ---- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Registration:
    incarnation: Incarnation
    role: Role
    address: str
    numerics_class: str
    metrics_address: str
    protocol_version: int
    run_id: str  # empty: whichever run this is
    memory_bytes: int = 0  # that a worker's stage may take; 0: not known


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What one step came to: the same from every shard of a timeline."""

    step: Step
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tally: Tally  # how often each lane was counted, over all sites of all chunks
    skipped: bool = False
    requests: int = 0  # REQUEST_* bits that took effect with this step
    refused: bool = False  # ASP: computed from too old a version, and computed anew


@dataclass(frozen=True, slots=True)
class Heartbeat:
    incarnation: Incarnation
    plan: PlanNumber
    version: Version
    steps: tuple[StepSummary, ...] = ()
    activity: str = ""
    caught_up: Mapping[ChunkId, Incarnation] = field(default_factory=dict)  # learners that this primary waits for, in `plan`
    lane_seconds: float = 0.0  # what a worker computes for one lane of a step, of late; 0: not known
    diverged: frozenset[ChunkId] = frozenset()  # chunks of which it has dropped its copy, in `plan`
    is_leaving: bool = False  # it wants to go as soon as it is not needed


@dataclass(frozen=True, slots=True)
class ValidationReport:
    incarnation: Incarnation
    version: Version
    index: int
    loss_sum: float
    tokens: int


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A shard's part of a checkpoint is durable; `error` says why it is not."""

    incarnation: Incarnation
    version: Version
    optimizer_step: int
    file: str
    num_bytes: int
    chunks: Mapping[ChunkId, Mapping[str, str]]
    error: str = ""
    timeline: int = 0  # in which the version was made
    clocks: tuple[int, ...] = ()  # ASP: batches that each lane has learnt from


@dataclass(frozen=True, slots=True)
class CheckpointMark:
    """A complete checkpoint: its version and its manifest's digest. Version 0 with no digest: the initial parameters."""

    version: Version
    digest: str
    clocks: tuple[int, ...] = ()  # ASP: batches that each lane had learnt from


NO_CHECKPOINT = CheckpointMark(Version(0), "")


# ---- answers -----------------------------------------------------------------------------------------------------------


class Fault(Enum):
    INCOMPATIBLE = "incompatible"  # another protocol, run or numerics class
    MALFORMED = "malformed"
    UNKNOWN_MEMBER = "unknown member"  # register anew
    NOT_ADMITTED = "not admitted"  # by its join token


@dataclass(frozen=True, slots=True)
class Refusal:
    fault: Fault
    reason: str


# ---- effects: what the shell does, in order ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Announce:
    """Make the plan durable, then hand it out."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class KeepMember:
    registration: Registration


Farewell = Literal["left", "silent", "connection_refused", "replaced"]
FAREWELLS: tuple[Farewell, ...] = get_args(Farewell)


@dataclass(frozen=True, slots=True)
class ForgetMember:
    """`farewell`: it had said that it would go; its lease ran out; nobody listens at its address; a newcomer has that."""

    incarnation: Incarnation
    farewell: Farewell


@dataclass(frozen=True, slots=True)
class TokenUse:
    """Keep that a join token was used, and by whom, until it expires."""

    nonce: str
    incarnation: Incarnation
    address: str
    expires_seconds: int  # unix time


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """Append to metrics.jsonl and to ledger.jsonl."""

    summary: StepSummary
    tokens_per_second: float  # 0: not known


@dataclass(frozen=True, slots=True)
class ValidationRow:
    """Append to metrics.jsonl."""

    version: Version
    loss: float


@dataclass(frozen=True, slots=True)
class DropRows:
    """A roll-back to `version`: forget rows of later steps and versions."""

    version: Version


@dataclass(frozen=True, slots=True)
class CommitCheckpoint:
    """Every chunk is in: write the manifest, then tell the core by `on_checkpoint_committed` or `on_checkpoint_failed`."""

    run_id: RunId
    version: Version
    optimizer_step: int
    timeline: int
    numerics_class: str
    parts: tuple[CheckpointReport, ...]


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """There will be no checkpoint of `version`."""

    version: Version
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the log."""

    text: str
    is_warning: bool = False


Effect = (
    Announce
    | KeepMember
    | ForgetMember
    | TokenUse
    | TrainingRow
    | ValidationRow
    | DropRows
    | CommitCheckpoint
    | CheckpointFailed
    | Note
)
