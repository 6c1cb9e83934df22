"""What a person sees of a run that trains: a picture that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardlane.cli.client import state_name
from shardlane.cli.rows import Row, format_row
from shardlane.pb.coordinator_pb2 import GetStatusResponse, MemberStatus, Role

LOSSES_MAX = 8192  # of the sparkline
RECENT_STEPS = 32  # over which speed is taken
_SPARK_WIDTH = 48
_BARS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = {"training": "green", "finished": "green", "paused": "yellow", "failed": "bold red"}


class View(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None: ...

    def note(self, text: str) -> None:
        """A line that stays."""

    def show_rows(self, rows: Iterable[Row]) -> None: ...

    def show_status(self, status: GetStatusResponse) -> None: ...


def choose_view(*, every_steps: int, last_step: int) -> View:
    """Of stdout's kind."""
    return LiveView(last_step) if sys.stdout.isatty() else PlainView(every_steps, last_step)


class PlainView:
    """Lines: every so many steps one, every validation one, and what the run waits for when that changes."""

    def __init__(self, every_steps: int, last_step: int) -> None:
        self._every_steps = every_steps
        self._last_step = last_step
        self._said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show_rows(self, rows: Iterable[Row]) -> None:
        for row in rows:
            step = row["step"]
            if "val_loss" in row or row.get("skipped") or step % self._every_steps == 0 or step == self._last_step - 1:
                self.note(format_row(row))

    def show_status(self, status: GetStatusResponse) -> None:
        waiting = f"waiting for {status.waiting_for}" if status.waiting_for else ""
        if waiting and waiting != self._said:
            self.note(waiting)
        self._said = waiting


class LiveView:
    """The picture, drawn anew as news come."""

    def __init__(self, last_step: int, console: Console | None = None) -> None:
        self.picture = Picture(last_step)
        self._live = Live(self.picture, console=console or Console(), refresh_per_second=4, redirect_stderr=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._live.__exit__(kind, _, __)

    def note(self, text: str) -> None:
        self._live.console.print(Text(text, style="dim"))

    def show_rows(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.picture.take(row)

    def show_status(self, status: GetStatusResponse) -> None:
        self.picture.status = status


class Picture:
    """What is known of the run, as something that rich can draw."""

    def __init__(self, last_step: int) -> None:
        self.status: GetStatusResponse | None = None
        self._last_step = last_step
        self._losses: deque[float] = deque(maxlen=LOSSES_MAX)
        self._recent: deque[Row] = deque(maxlen=RECENT_STEPS)
        self._validation: Row | None = None

    def take(self, row: Row) -> None:
        if "val_loss" in row:
            self._validation = row
            return
        self._recent.append(row)
        if row["loss"] is not None:
            self._losses.append(row["loss"])

    @property
    def tokens_per_second(self) -> float:
        """Over the recent steps."""
        timed = [row for row in self._recent if row["tokens_per_second"]]
        seconds = sum(row["tokens"] / row["tokens_per_second"] for row in timed)
        return sum(row["tokens"] for row in timed) / seconds if seconds else 0.0

    @property
    def version(self) -> int:
        known = self._recent[-1]["step"] + 1 if self._recent else 0
        return max(known, self.status.version if self.status else 0)

    @property
    def eta_seconds(self) -> float | None:
        """Until the last step; None while the speed is not known."""
        speed = self.tokens_per_second
        return (self._last_step - self.version) * self._recent[-1]["tokens"] / speed if speed else None

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._headline()]
        if self.status is not None and self.status.plan.replicas:
            parts += ["", _topology(self.status)]
        if self._losses:
            parts += ["", self._training()]
        progress = Table.grid(padding=(0, 1))
        eta = self.eta_seconds
        progress.add_row(
            ProgressBar(total=max(1, self._last_step), completed=self.version, width=_SPARK_WIDTH),
            f"{self.version}/{self._last_step} steps",
            "" if eta is None or self.version >= self._last_step else f"{format_seconds(eta)} to go",
        )
        return Group(*parts, "", progress)

    def _headline(self) -> Text:
        if self.status is None:
            return Text("starting …", style="dim")
        state = state_name(self.status.state)
        headline = Text.assemble((self.status.run_id, "bold"), "  ", (state, _STATE_STYLES.get(state, "cyan")))
        if self.status.plan.number.epoch:
            headline.append(f"  plan {self.status.plan.number.term}.{self.status.plan.number.epoch}", "dim")
        if why := self.status.reason or (self.status.waiting_for and f"waiting for {self.status.waiting_for}"):
            headline.append(f"  {why}", "yellow")
        return headline

    def _training(self) -> Table:
        newest = self._recent[-1]
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", Text(f"{self._losses[-1]:.4f}", "bold"), Text(sparkline(self._losses, _SPARK_WIDTH), "cyan"))
        if self._validation is not None and self._validation["val_loss"] is not None:
            at = f"at step {self._validation['step']}"
            table.add_row("val_loss", f"{self._validation['val_loss']:.4f}", Text(at, "dim"))
        norm = "nan" if newest["grad_norm"] is None else f"{newest['grad_norm']:.3f}"
        table.add_row("tokens/s", f"{self.tokens_per_second:,.0f}", Text(f"grad_norm {norm}  lr {newest['lr']:.2e}", "dim"))
        return table


def _topology(status: GetStatusResponse) -> Table:
    """Replicas down, stages across, and the shards below."""
    plan = status.plan
    members = {each.member.incarnation: each for each in status.members}
    names = [member.incarnation for member in plan.members]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("")
    for index, stage in enumerate(plan.stages):
        table.add_column(f"stage {index}: layers {_span(stage.first, stage.end)}")
    for index, replica in enumerate(plan.replicas):
        lanes = ", ".join(_span(block.first, block.first + block.size) for block in replica.blocks)
        table.add_row(f"replica {index}, lanes {lanes}", *(_member(members.get(names[each])) for each in replica.workers))
    shards = [member.incarnation for member in plan.members if member.role == Role.ROLE_SHARD]
    for index, (name, num_chunks) in enumerate(zip(shards, status.chunks_by_shard, strict=False)):
        table.add_row(f"shard {index}, {num_chunks} chunks", _member(members.get(name)))
    return table


def _member(member: MemberStatus | None) -> Text:
    if member is None:
        return Text("gone", "red")
    return Text(member.activity or "joined", "green" if member.lease_age_seconds < 3.0 else "yellow")


def _span(first: int, end: int) -> str:
    return str(first) if end == first + 1 else f"{first}-{end - 1}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values, oldest first, in at most `width` bars; each bar is the mean of its part."""
    kept = list(values)
    num_bars = min(width, len(kept))
    bounds = [index * len(kept) // num_bars for index in range(num_bars + 1)] if kept else []
    means = [sum(kept[first:end]) / (end - first) for first, end in pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(_BARS[round((mean - low) / (high - low or 1.0) * (len(_BARS) - 1))] for mean in means)


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
