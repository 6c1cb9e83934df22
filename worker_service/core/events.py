"""What a stepper is told, and what it wants done.

`attempt` numbers the work between two abandonments: the end of abandoned work says nothing any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, SiteIndex, Version
from shardlane.lanes import Block
from shardlane.plan import Plan

RunState = Literal["gathering", "training", "paused", "finishing", "finished", "failed"]
Outcome = Literal["overlaps", "not_yet", "not_owner", "stale"]


@dataclass(frozen=True, slots=True)
class Key:
    """What one contribution is of."""

    step: Version
    chunk: ChunkId
    site: SiteIndex
    block: Block


@dataclass(frozen=True, slots=True)
class Refusal:
    """A contribution that was neither counted nor a duplicate; `missing` lanes are to be sent by themselves."""

    key: Key
    outcome: Outcome
    missing: tuple[Block, ...] = ()


# ---- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanAdopted:
    plan: Plan


@dataclass(frozen=True, slots=True)
class StateChanged:
    state: RunState


@dataclass(frozen=True, slots=True)
class Pulled:
    """The parameters are those of the version that was asked for."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Superseded:
    """A shard has left the version asked for; it is at `now`."""

    attempt: int
    now: Version


@dataclass(frozen=True, slots=True)
class Validated:
    attempt: int


@dataclass(frozen=True, slots=True)
class Ran:
    """Every forward and backward is done, and every sum is with the pusher; or the step is closed, as `published` tells."""

    attempt: int
    published: Version


@dataclass(frozen=True, slots=True)
class Offered:
    """ASP: this turn may be taken next."""

    attempt: int
    number: Version


@dataclass(frozen=True, slots=True)
class Answered:
    """A push stream ended; what was refused of it."""

    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class PullEnded:
    """A shard ended a pull of the next version without it: it may have taken up a plan, and with it forgotten what it had
    counted (DESIGN.md, section 4, rule 10)."""

    shard: Incarnation


@dataclass(frozen=True, slots=True)
class PeerAhead:
    """A neighbour in the replica that `formed` knows that `version` is published."""

    version: Version
    formed: PlanNumber


@dataclass(frozen=True, slots=True)
class PeerReseated:
    """A neighbour has taken up its seat in a replica that `formed` by this plan."""

    formed: PlanNumber


@dataclass(frozen=True, slots=True)
class LaneAsked:
    """The stage after wants a lane of the open step run again."""

    version: Version
    lane: Lane


@dataclass(frozen=True, slots=True)
class LaneTold:
    """The stage before will run a lane of the open step again."""

    version: Version
    lane: Lane


Event = (
    PlanAdopted
    | StateChanged
    | Pulled
    | Superseded
    | Validated
    | Ran
    | Offered
    | Answered
    | PullEnded
    | PeerAhead
    | PeerReseated
    | LaneAsked
    | LaneTold
)

# ---- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop the work under way and forget the work not begun."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Be stage `stage` of replica `replica` from now on; everything of an earlier seat is void."""

    plan: Plan
    replica: int
    stage: int


@dataclass(frozen=True, slots=True)
class Rest:
    """The plan has no seat for this worker."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Reroute:
    """Keep the seat and what is under way in it; push to, and pull from, the shards of this plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask for `version` early. Its values may not reach the parameters before `Pull`."""

    version: Version


@dataclass(frozen=True, slots=True)
class Await:
    """ASP: ask for `numbers`, and wait until one of them has come; without any, until the stage before sends something of a
    turn, or of the last version alone. Ends in `Offered`."""

    attempt: int
    numbers: tuple[Version, ...]
    only_last: bool = False


@dataclass(frozen=True, slots=True)
class Pull:
    """Fill the parameters; ends in `Pulled` or `Superseded`. Then steps below `published` are closed, and those below `step` are
    done here; under ASP the turns of the same lane."""

    attempt: int
    version: Version
    step: Version
    published: Version


@dataclass(frozen=True, slots=True)
class Validate:
    attempt: int
    version: Version
    indices: tuple[int, ...]  # of the validation's micro-batches


@dataclass(frozen=True, slots=True)
class Run:
    """Compute `step` and push the sum of each block; ends in `Ran`. `again`: its lanes ran before."""

    attempt: int
    step: Version
    blocks: tuple[Block, ...]
    again: bool = False


@dataclass(frozen=True, slots=True)
class PushAgain:
    """Send kept sums once more."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class PushAllAgain:
    """Send once more what is kept of the chunks that `shard` owns."""

    shard: Incarnation


@dataclass(frozen=True, slots=True)
class AskAbove:
    version: Version
    lane: Lane


@dataclass(frozen=True, slots=True)
class Reopen:
    """What neighbours send of a lane of the open step is to be taken once more."""

    version: Version
    lane: Lane


@dataclass(frozen=True, slots=True)
class TellBelow:
    version: Version
    lane: Lane


@dataclass(frozen=True, slots=True)
class Leave:
    """The run is over."""


Work = Begin | Rest | Ask | Await | Pull | Validate | Run | Leave  # in order, by the thread that computes
Effect = Work | Abandon | Reroute | PushAgain | PushAllAgain | AskAbove | Reopen | TellBelow
