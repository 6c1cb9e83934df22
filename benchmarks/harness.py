"""Paired rounds: what is compared runs in turn, in the same minutes, on the same machine, and the ratio of each round counts.

Absolute figures drift from minute to minute; the ratio of two things measured side by side hardly does. `low` and `high` are
the quartiles of the rounds' ratios: one round beside a neighbour's noise does not decide, and half of the rounds lie between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shardlane.machine import machine

Samples = list[float]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises `ValueError` without a sample."""
        if not samples:
            raise ValueError("no samples; a benchmark needs at least one round")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Target:
    """Between what a ratio must lie: its median and quartiles. None: that end is free."""

    median: float | None = None
    low: float | None = None
    median_max: float | None = None
    high_max: float | None = None

    def misses(self, ratio: Spread) -> list[str]:
        """What falls short or goes beyond, in words."""
        found = []
        for name, value, least in (("median", ratio.median, self.median), ("low", ratio.low, self.low)):
            if least is not None and value < least:
                found.append(f"{name} {value:.3f} < {least:g}")
        for name, value, most in (("median", ratio.median, self.median_max), ("high", ratio.high, self.high_max)):
            if most is not None and value > most:
                found.append(f"{name} {value:.3f} > {most:g}")
        return found

    def as_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        signs = {"median": ">=", "low": "low >=", "median_max": "<=", "high_max": "high <="}
        return ", ".join(f"{signs[name]} {value:g}" for name, value in self.as_json().items())


def alternate(subjects: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int = 1) -> dict[str, Samples]:
    """Runs every subject once a round, each round beginning with the next one; the rates they return, without the warm-up's."""
    names = list(subjects)
    samples: dict[str, Samples] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            rate = subjects[name]()
            if index >= warm_up:
                samples[name].append(rate)
    return samples


@dataclass
class Report:
    """What a benchmark has found."""

    name: str
    unit: str  # of every rate
    samples: dict[str, Samples] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of the JSON

    def compare(self, ours: str, peer: str, target: Target | None = None, *, name: str = "") -> None:
        """Adds the ratio of two rates, paired round by round. Raises `ValueError` if they have not as many rounds."""
        name = name or f"{ours} / {peer}"
        pairs = zip(self.samples[ours], self.samples[peer], strict=True)
        self.ratios[name] = Spread.of([mine / other for mine, other in pairs])
        if target is not None:
            self.targets[name] = target

    def misses(self) -> list[str]:
        """A line for each target that is missed."""
        return [f"{name}: {miss}" for name, target in self.targets.items() for miss in target.misses(self.ratios[name])]

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "unit": self.unit,
            "ratios": {name: ratio.as_json() for name, ratio in self.ratios.items()},
            "targets": {name: target.as_json() for name, target in self.targets.items()},
            "rates": {name: Spread.of(samples).as_json() for name, samples in self.samples.items()},
            "samples": self.samples,
            "notes": self.notes,
            **self.extra,
        }

    def show(self, console: Console) -> None:
        where = machine()
        console.print(f"[bold]{self.name}[/bold]  {where['cpu']}, {where['cores']} cores{_of_gpu(where)}", highlight=False)
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        console.print(f"Python {where['python']}, {versions}", highlight=False)
        rates = Table(title=f"rates, {self.unit}", title_justify="left")
        for column in ("", "median", "low", "high", "rounds"):
            rates.add_column(column, justify="left" if not column else "right")
        for name, samples in self.samples.items():
            rates.add_row(name, *_figures(Spread.of(samples)), str(len(samples)))
        console.print(rates)
        ratios = Table(title="ratios, paired round by round", title_justify="left")
        for column in ("", "median", "low", "high", "target", ""):
            ratios.add_column(column, justify="left" if column in ("", "target") else "right")
        for name, ratio in self.ratios.items():
            target = self.targets.get(name)
            verdict = "" if target is None else "[red]missed[/red]" if target.misses(ratio) else "[green]met[/green]"
            ratios.add_row(name, *_figures(ratio), "" if target is None else str(target), verdict)
        console.print(ratios)
        console.print("low and high are quartiles of the rounds", style="dim")
        for note in self.notes:
            console.print(note, highlight=False)


def _figures(spread: Spread) -> tuple[str, str, str]:
    digits = 0 if spread.median >= 100 else 3
    return f"{spread.median:.{digits}f}", f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"


def _of_gpu(where: Mapping[str, Any]) -> str:
    return f", {where['gpu']}" if where.get("gpu") else ""


def arguments(name: str, description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--check", action="store_true", help="exit 1 when a ratio misses its target")
    parser.add_argument("--rounds", type=_positive, default=rounds, help="alternating rounds that count (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def finish(report: Report, options: argparse.Namespace) -> int:
    """Shows and writes the report; the exit status."""
    report.show(Console(width=None if sys.stdout.isatty() else 110))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    misses = report.misses()
    for miss in misses:
        print(f"benchmarks.{report.name}: {miss}", file=sys.stderr)
    return int(bool(misses) and options.check)
