"""What shards say to one another, and what the core asks of its shell. Values only; `ps.proto` is their wire format."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, SiteIndex, Step, Timeline, Version
from shardlane.lanes import Block
from shardlane.tally import Tally
from shardlane.turns import Clocks, Turn


@dataclass(frozen=True, slots=True)
class Record:
    """What was found at the close of one chunk of one step. Computed once; true for ever within its timeline."""

    step: Step
    chunk: ChunkId
    square_norm: float  # of the sum, fp64; not finite if the sum is not
    tokens: int
    loss: float  # sum over the step's tokens, in nats; only on the loss chunk, else 0
    digest: int  # xxh3_64 of the sum's bytes
    tally: Tally  # how often each lane was added in, over the chunk's sites
    requests: int = 0  # REQUEST_* bits
    turn: Turn | None = None  # under ASP: whose sum it is


# ---- between shards ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replicate:
    """The sum of `record` goes along. `previous`: every chunk's record of the step before, when the receiver may lack them."""

    record: Record
    previous: tuple[Record, ...] = ()
    is_compared: bool = False  # the sender's parameters before this step are to be compared with the receiver's
    parameters_digest: int = 0  # xxh3_64 of them; only shells know it


@dataclass(frozen=True, slots=True)
class Ack:
    """The sender is at version `step` of the chunks and holds their sums of `step`."""

    step: Step
    chunks: tuple[ChunkId, ...]


@dataclass(frozen=True, slots=True)
class Records:
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Refill:
    """A chunk's parameters, optimizer state and, if closed, sum go along, for a learner."""

    chunk: ChunkId
    version: Version
    closed: Record | None
    previous: tuple[Record, ...]
    num_steps: int = 0  # updates that the optimizer has applied; only shells know it
    clocks: Clocks = ()


@dataclass(frozen=True, slots=True)
class Position:
    """Where a learner stands with a chunk; or an in-sync backup, to which a sum came before it could take it."""

    chunk: ChunkId
    version: Version
    closed: bool


Message = Replicate | Ack | Records | Refill | Position


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message between shards with what fences it: roles by plan number, facts by timeline."""

    sender: Incarnation
    plan: PlanNumber
    timeline: int
    message: Message


# ---- answers to workers ------------------------------------------------------------------------------------------------


class Outcome(Enum):
    COUNTED = "counted"
    DUPLICATE = "duplicate"
    OVERLAPS = "overlaps"
    NOT_YET = "not_yet"
    NOT_OWNER = "not_owner"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Answer:
    outcome: Outcome
    missing: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Contribution:
    """The sum of a block of lanes for one chunk at one site; the values stay with the shell."""

    timeline: int
    step: Step
    block: Block
    site: SiteIndex
    chunk: ChunkId
    tokens: int
    loss: float


# ---- effects: what the shell does, in order ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep the contribution's values as the partial sum of `block`."""

    step: Step
    chunk: ChunkId
    site: SiteIndex
    block: Block


@dataclass(frozen=True, slots=True)
class Join:
    """left += right; the result is the partial sum of their parent block."""

    step: Step
    chunk: ChunkId
    site: SiteIndex
    left: Block
    right: Block


@dataclass(frozen=True, slots=True)
class Close:
    """Add the sums of `block` over the sites, in order; measure that, and tell the core by `on_measured`."""

    chunk: ChunkId
    step: Step
    block: Block


@dataclass(frozen=True, slots=True)
class KeepSum:
    """Keep the values that came with a Replicate as the chunk's sum, in place of any other."""

    chunk: ChunkId


@dataclass(frozen=True, slots=True)
class Compare:
    """Tell the core by `on_compared` whether the chunk's parameters have this digest."""

    chunk: ChunkId
    sender: Incarnation
    digest: int


@dataclass(frozen=True, slots=True)
class KeepState:
    """Take over the state that came with a Refill."""

    chunk: ChunkId
    version: Version
    with_sum: bool
    clocks: Clocks = ()


@dataclass(frozen=True, slots=True)
class Apply:
    """One optimizer step on the chunk with its sum times `scale`; with `scale` None the step is skipped. The sum is then free.

    Under ASP `clocks` are those after it, and `lane` is computed from the parameters as they are now, from now on.
    """

    chunk: ChunkId
    step: Step
    scale: float | None
    learning_rate: float
    lane: Lane | None = None
    clocks: Clocks = ()


@dataclass(frozen=True, slots=True)
class Publish:
    """Pulls of `version`, and of turns that have come by `clocks`, may be answered from now on."""

    chunk: ChunkId
    version: Version
    clocks: Clocks = ()


@dataclass(frozen=True, slots=True)
class DropSums:
    """Free the chunk's partial sums, and its whole sum unless it is closed and `keep_closed`."""

    chunk: ChunkId
    keep_closed: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """The chunk is no longer held here."""

    chunk: ChunkId


@dataclass(frozen=True, slots=True)
class Load:
    """Read the chunks as the timeline began with them: from its checkpoint, or as initial parameters."""

    timeline: Timeline
    chunks: tuple[ChunkId, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """To another shard, with the chunk's values if the message announces any."""

    to: Incarnation
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Announce:
    """A step was decided: tell the coordinator."""

    step: Step
    decision: Decision


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Write the parts of `version` for which this shard is primary."""

    version: Version
    chunks: tuple[ChunkId, ...]


@dataclass(frozen=True, slots=True)
class AskInSync:
    """The learner has caught up: ask the coordinator, for this epoch, to list it as in sync."""

    plan: PlanNumber
    chunk: ChunkId
    learner: Incarnation


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that must not happen has happened; `text` says what, for the log and the metrics."""

    text: str


Effect = (
    Keep | Join | Close | KeepSum | Compare | KeepState | Apply | Publish | DropSums | Forget | Load | Send | Announce
    | Checkpoint | AskInSync | Alarm
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """What all records of one step come to; the same on every shard."""

    skipped: bool
    scale: float  # the sum of gradients is multiplied by it: clipping and the division by the step's tokens
    grad_norm: float
    learning_rate: float
    tokens: int
    loss: float  # mean over the step's tokens
    tally: Tally  # how often each lane was counted, over all sites of all chunks
    requests: int  # REQUEST_* bits of any record, to be met at the next version by every shard
    checkpoint: bool  # write the next version
    stop: bool  # the next version is the run's last
    turn: Turn | None = None  # under ASP
    refused: bool = False  # it was computed from too old a version: not applied, and its lane computes it anew
