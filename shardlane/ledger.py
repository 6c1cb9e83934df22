"""ledger.jsonl: what its lines say, and whether they prove that every micro-batch of every step was counted exactly once.

Lines are JSON objects of two kinds and are never rewritten. One begins a timeline: what stands above it of steps from `version`
on is superseded, and entries below it are measured by what it `expects` of a step. The other is the entry of one step, whose
`lanes` are runs of [first, size, least, most] (`shardlane.tally`).

    {"timeline":1,"version":20,"lost_steps":12,"reason":"…","expects":{"tables":38,"lanes":4,"micro_batches":8,"tokens":512}}
    {"step":20,"timeline":1,"tokens":512,"tables":38,"lanes":[[0,4,1,1]]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from shardlane.config import Config
from shardlane.ids import Lane
from shardlane.partition import Layout
from shardlane.tally import LaneRun, Tally, are_runs


@dataclass(frozen=True, slots=True)
class Expected:
    """What a config makes of every step."""

    tables: int  # sites of all chunks
    lanes: int
    micro_batches: int  # over all lanes, each of which owns as many
    tokens: int
    lanes_a_step: int = 0  # ASP: 1, and the micro-batches and tokens are those of one; 0: all

    @classmethod
    def of(cls, config: Config) -> Expected:
        layout, train = Layout.of(config), config.train
        tables = sum(layout.num_sites(chunk.id) for chunk in layout.chunks)
        num_tokens, parts = train.global_batch_size * train.seq_len, train.lanes if train.goes_by_turns else 1
        return cls(tables, train.lanes, train.num_micro_batches // parts, num_tokens // parts, int(train.goes_by_turns))


@dataclass(frozen=True, slots=True)
class TimelineStart:
    """A timeline begins with `version`: what was counted of later steps is void."""

    timeline: int
    version: int
    lost_steps: int
    reason: str
    expects: Expected


@dataclass(frozen=True, slots=True)
class Entry:
    """What was counted in one step of a timeline."""

    step: int
    timeline: int
    tokens: int
    tally: Tally
    skipped: bool = False  # its gradients were not finite: counted, and not applied
    refused: bool = False  # ASP: computed from too old a version; counted, not applied, and computed anew


def to_line(item: TimelineStart | Entry) -> bytes:
    match item:
        case TimelineStart():
            values = asdict(item)
        case Entry(step, timeline, tokens, tally):
            values = {"step": step, "timeline": timeline, "tokens": tokens, "tables": tally.tables, "lanes": tally.runs}
            values |= {name: True for name in ("skipped", "refused") if getattr(item, name)}
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> TimelineStart | Entry:
    """Raises `ValueError` if it is no line of a ledger."""
    try:
        values = json.loads(line)
        if "step" not in values:
            numbers = [_count(values[name]) for name in ("timeline", "version", "lost_steps")]
            expects = Expected(**{name: _count(value) for name, value in values["expects"].items()})
            return TimelineStart(numbers[0], numbers[1], numbers[2], str(values["reason"]), expects)
        numbers = [_count(values[name]) for name in ("step", "timeline", "tokens", "tables")]
        runs = tuple(LaneRun(*map(_count, run)) for run in values["lanes"])
        flags = [values.get(name) is True for name in ("skipped", "refused")]
        return Entry(numbers[0], numbers[1], numbers[2], Tally(numbers[3], runs), *flags)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a line of a ledger: {line[:80]!r}") from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"found {value!r} where a count was expected")
    return value


@dataclass(frozen=True, slots=True)
class RollBack:
    """A timeline that superseded entries of those before it."""

    timeline: int
    version: int
    num_superseded: int
    reason: str


@dataclass
class Account:
    """What a ledger comes to. Without `faults` each micro-batch of steps `first_step … first_step + num_steps - 1` was counted
    exactly once in every table."""

    expects: Expected  # in the newest timeline
    first_step: int = 0
    num_steps: int = 0  # that stand
    num_skipped: int = 0  # of them
    num_entries: int = 0  # with those that are superseded
    num_micro_batches: int = 0  # without those of refused steps, which are computed anew
    num_refused: int = 0
    lanes: list[Lane | None] = field(default_factory=list)  # ASP: whose each of the steps that stand is
    restarts: list[int] = field(default_factory=list)  # versions that timelines began with, each once, rising
    roll_backs: list[RollBack] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # a line each, by step; superseded entries have none


@dataclass(frozen=True, slots=True)
class _Standing:
    line: bytes
    entry: Entry
    expects: Expected
    faults: tuple[str, ...]


def judge(lines: Iterable[bytes], expects: Expected, *, reached: int = 0) -> Account:
    """`lines`: the ledger, in order; a last one without its newline is still being written and left out.

    `expects`: what the run's config makes of a step now. `reached`: the version of a checkpoint that the run has taken, so
    that a ledger whose end is lost does not pass for a whole one.
    """
    account, standing, start = Account(expects), dict[int, _Standing](), None
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            item = from_line(line)
        except ValueError as error:
            account.faults.append(f"line {number}: {error}")
            break
        if isinstance(item, TimelineStart):
            account.first_step = item.version if start is None else min(account.first_step, item.version)
            start, account.expects = item, item.expects
            account.restarts = [*(each for each in account.restarts if each < item.version), item.version]
            _supersede(account, standing, item)
            continue
        account.num_entries += 1
        if start is None or start.timeline != item.timeline:
            account.faults.append(f"line {number}: step {item.step} is of timeline {item.timeline}, which has not begun there")
            break
        _take(standing, line, item, start.expects)
    return _conclude(account, standing, expects, reached)


def _supersede(account: Account, standing: dict[int, _Standing], start: TimelineStart) -> None:
    void = [step for step in standing if step >= start.version]
    for step in void:
        del standing[step]
    if void:
        account.roll_backs.append(RollBack(start.timeline, start.version, len(void), start.reason))


def _take(standing: dict[int, _Standing], line: bytes, entry: Entry, expects: Expected) -> None:
    """The same line twice tells one fact twice; two that differ cannot both be true."""
    known = standing.setdefault(entry.step, _Standing(line, entry, expects, tuple(faults_of(entry, expects))))
    if known.line != line:
        fault = f"step {entry.step}: there are two entries in timeline {entry.timeline}, and they differ"
        standing[entry.step] = _Standing(known.line, known.entry, expects, (*known.faults, fault))


def _conclude(account: Account, standing: dict[int, _Standing], expects: Expected, reached: int) -> Account:
    for name, ours in asdict(expects).items():
        if (theirs := asdict(account.expects)[name]) != ours:
            account.faults.append(f"the newest timeline was begun for {theirs} {name} a step; the config has {ours}")
    following = account.first_step
    for step in sorted(standing):
        if step != following:
            account.faults.append(f"{_range('step', following, step - 1)}: no entry")
        account.faults += standing[step].faults
        account.num_micro_batches += 0 if standing[step].entry.refused else standing[step].expects.micro_batches
        account.num_skipped += standing[step].entry.skipped
        account.num_refused += standing[step].entry.refused
        account.lanes += [lane_of(standing[step].entry)] if expects.lanes_a_step else []
        following = step + 1
    if reached > following:
        account.faults.append(f"{_range('step', following, reached - 1)}: no entry; there is a checkpoint of version {reached}")
    account.num_steps = len(standing)
    return account


def faults_of(entry: Entry, expects: Expected) -> list[str]:
    """What keeps the entry from saying that every micro-batch of its step was counted exactly once in every table."""
    where, tally, faults = f"step {entry.step}", entry.tally, []
    if not are_runs(tally.runs, expects.lanes):
        return [f"{where}: lanes {[list(run) for run in tally.runs[:8]]} are not lanes 0..{expects.lanes - 1}, each once"]
    if expects.lanes_a_step:
        return _faults_of_turn(entry, expects)
    owned = expects.micro_batches // expects.lanes
    for run in tally.runs:
        if not run.is_exact:
            lanes = _range("lane", run.first, run.first + run.size - 1)
            owns = f"micro-batches {run.first * owned}..{(run.first + run.size) * owned - 1}"
            times = run.most if run.most > 1 else run.least
            faults.append(f"{where}, {lanes} ({owns}): counted {times} times in a table")
    return faults + _faults_of_sizes(entry, expects)


def _faults_of_turn(entry: Entry, expects: Expected) -> list[str]:
    found = ", ".join(
        f"{_range('lane', run.first, run.first + run.size - 1)}: {run.most}" for run in entry.tally.runs if run.most
    )
    is_one = lane_of(entry) is not None
    wrong = [] if is_one else [f"step {entry.step}: counted {found or 'nothing'}; a step is one lane's, once in every table"]
    return wrong + _faults_of_sizes(entry, expects)


def _faults_of_sizes(entry: Entry, expects: Expected) -> list[str]:
    where, faults = f"step {entry.step}", []
    if entry.tally.tables != expects.tables:
        faults.append(f"{where}: counted in {entry.tally.tables} tables; the model has {expects.tables}")
    if entry.tokens != expects.tokens:
        faults.append(f"{where}: {entry.tokens} tokens counted; the config makes them {expects.tokens}")
    return faults


def lane_of(entry: Entry) -> Lane | None:
    """ASP: whose step it is, if it is one lane's, counted once in every table."""
    counted = [run for run in entry.tally.runs if run.most]
    return Lane(counted[0].first) if len(counted) == 1 and counted[0].size == 1 and counted[0].is_exact else None


def _range(noun: str, first: int, last: int) -> str:
    return f"{noun} {first}" if first == last else f"{noun}s {first}..{last}"
