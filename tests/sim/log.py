"""What the oracle knows of ASP: the log of each timeline, and what every turn must have been computed from (decision 10)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ps_service.core.messages import Decision
from shardlane import turns
from shardlane.ids import Lane, Step, Timeline, Version
from shardlane.turns import Clocks


@dataclass
class Log:
    """Of one timeline: `clocks[i]` after i entries of its own."""

    timeline: Timeline
    num_lanes: int
    clocks: list[Clocks] = field(default_factory=list)
    read: dict[int, Version] = field(default_factory=dict)  # by a turn's number, what it is computed from

    def __post_init__(self) -> None:
        self.clocks.append(turns.beginning(self.timeline, self.num_lanes))
        for lane, clock in enumerate(self.clocks[0]):
            self.read[turns.number_of(lane, clock.taken, self.num_lanes)] = self.timeline.version

    def fault_of(self, step: Step, decision: Decision) -> str:
        """Takes the entry that leads on from version `step`, if it is the next; what is wrong with it, or nothing."""
        index = step - self.timeline.version
        if decision.turn is None or index > len(self.clocks) - 1:
            return f"step {step} is decided as {decision}; the log has {len(self.clocks) - 1} entries"
        lane, _ = turns.place_of(decision.turn.number, self.num_lanes)
        before = self.clocks[index]
        if decision.turn != turns.turn_at(before, Lane(lane), Version(step)):
            return f"step {step} is decided as {decision.turn}, with lanes at {before}"
        if [(run.first, run.size, run.most) for run in decision.tally.runs if run.most] != [(lane, 1, 1)]:
            return f"in step {step}, of lane {lane}, lanes were counted as {decision.tally}"
        if index == len(self.clocks) - 1:
            self.clocks.append(turns.after(before, decision.turn, Version(step + 1), refused=decision.refused))
            self.read[turns.number_of(lane, self.clocks[-1][lane].taken, self.num_lanes)] = Version(step + 1)
        return ""

    def clocks_at(self, version: int) -> tuple[int, ...]:
        """Batches that each lane has learnt from."""
        return tuple(each.clock for each in self.clocks[version - self.timeline.version])
