"""What a run of faults came to: a table for people, figures for a file, and what misses its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from shardlane.chaos.outcome import Outcome, percentile
from shardlane.machine import machine

MEDIAN_SECONDS_MAX = 2.0  # of recovery from the death of a worker or a shard
P95_SECONDS_MAX = 5.0
TARGETED = ("worker, ", "shard, ")  # how their groups begin
LEGEND = (
    "p50, p95, max: how long training stood still beyond an ordinary step; of what hangs, from when it was seen",
    "seen: until there was another plan; whole: until every process and every copy was back; medians",
)


@dataclass
class Report:
    settings: Mapping[str, Any]  # shape, seed, means: what makes the same faults again
    outcomes: Sequence[Outcome]
    seconds: float  # that the cluster was up
    failure: str = ""  # why faults ended early
    version: int | None = None  # at the end
    digest: str = ""
    reference_digest: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return bool(self.digest) and self.digest == self.reference_digest

    @property
    def groups(self) -> dict[str, list[Outcome]]:
        """By what they hit and how, in order of name."""
        found: dict[str, list[Outcome]] = {}
        for outcome in sorted(self.outcomes, key=lambda each: each.group):
            found.setdefault(outcome.group, []).append(outcome)
        return found

    def misses(self) -> list[str]:
        """A line for each promise that is broken."""
        found = [self.failure] if self.failure else []
        if not self.is_equal:
            found.append(f"digest {self.digest[:12] or 'none'} is not the reference's, {self.reference_digest[:12] or 'none'}")
        for group, outcomes in self.groups.items():
            if open_ones := sum(not each.is_complete for each in outcomes):
                found.append(f"{group}: {open_ones} never recovered from")
            if lost := sum(each.steps_rolled_back for each in outcomes if not each.rolls_back):
                found.append(f"{group}: {lost} steps rolled back")
        for role in TARGETED:
            for kind in sorted({each.kind for each in self.outcomes if each.group.startswith(role)}):
                of_both = [each for each in self.outcomes if each.group.startswith(role) and each.kind == kind]
                figures = spread(_seen(of_both, "recovery_seconds"))
                for name, most in (("p50", MEDIAN_SECONDS_MAX), ("p95", P95_SECONDS_MAX)):
                    if figures and figures[name] > most:
                        found.append(f"{role}{kind}: recovery {name} {figures[name]:.2f} s > {most:g} s")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": "chaos",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            **self.settings,
            "seconds": round(self.seconds, 1),
            "steps": self.version,
            "steps_rolled_back": sum(each.steps_rolled_back for each in self.outcomes),
            "digest": {"cluster": self.digest, "reference": self.reference_digest, "equal": self.is_equal},
            "targets": {"recovery_seconds": {"p50": MEDIAN_SECONDS_MAX, "p95": P95_SECONDS_MAX}, "of": "workers and shards"},
            "misses": self.misses(),
            "groups": {group: _figures(outcomes) for group, outcomes in self.groups.items()},
            "notes": self.notes,
            "faults": [each.as_json() for each in self.outcomes],
        }

    def show(self, console: Console) -> None:
        table = Table(title="faults, and seconds of recovery", title_justify="left")
        table.add_column("hit")
        for column in ("faults", "p50", "p95", "max", "seen", "whole", "rolled back"):
            table.add_column(column, justify="right")
        for group, outcomes in self.groups.items():
            figures = _figures(outcomes)
            recovery = figures["recovery_seconds"]
            table.add_row(
                group,
                str(figures["faults"]),
                *(_seconds(recovery.get(name)) for name in ("p50", "p95", "max")),
                *(_seconds(figures[name].get("p50")) for name in ("detection_seconds", "whole_seconds")),
                str(figures["steps_rolled_back"]),
            )
        console.print(table)
        for line in LEGEND:
            console.print(line, style="dim", highlight=False, soft_wrap=True)
        steps = f"{self.version} steps, {sum(each.steps_rolled_back for each in self.outcomes)} rolled back"
        console.print(f"{len(self.outcomes)} faults in {self.seconds:.0f} s, {steps}", highlight=False)
        if self.is_equal:
            verdict = f"digest [green]equal[/green] to the reference's: {self.digest}"
        else:
            verdict = f"digest [red]differs[/red]: {self.digest or 'none'}, the reference's {self.reference_digest or 'none'}"
        console.print(verdict, highlight=False, soft_wrap=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Nearest ranks; empty without values."""
    if not values:
        return {}
    return {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95), "max": max(values)}


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    names = ("recovery_seconds", "detection_seconds", "whole_seconds", "later_pause_seconds")
    return {
        "faults": len(outcomes),
        "recovered": sum(each.recovery_seconds is not None for each in outcomes),
        **{name: {key: round(value, 3) for key, value in spread(_seen(outcomes, name)).items()} for name in names},
        "steps_rolled_back": sum(each.steps_rolled_back for each in outcomes),
    }


def _seen(outcomes: Sequence[Outcome], name: str) -> list[float]:
    return [value for each in outcomes if (value := getattr(each, name)) is not None]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
