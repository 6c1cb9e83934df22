"""Where a run stands, as lines of text: what `shardlane status` prints and `shardlane top` draws again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator

from shardlane.cli.client import state_name
from shardlane.cli.live import format_seconds, sparkline
from shardlane.pb.coordinator_pb2 import GetStatusResponse, MemberStatus, Role

WIDTH_MIN = 40
SILENT_SECONDS = 3.0
EVENTS_SHOWN = 8
_COLOURS = {"good": "32", "warn": "33", "bad": "1;31", "dim": "2", "bold": "1"}
_LOOKS = {"training": "good", "finished": "good", "paused": "warn", "gathering": "warn", "failed": "bad"}


class Paint:
    """Colours, or none: a pipe and a file get plain text."""

    def __init__(self, is_coloured: bool) -> None:
        self._is_coloured = is_coloured

    def __call__(self, look: str, text: str) -> str:
        return f"\x1b[{_COLOURS[look]}m{text}\x1b[0m" if self._is_coloured and look and text else text


def lines_of(status: GetStatusResponse, *, width: int, paint: Paint, num_events: int = EVENTS_SHOWN) -> list[str]:
    """None is wider than `width` (at least `WIDTH_MIN`), colours apart."""
    width = max(width, WIDTH_MIN)
    parts = [_head(status, width, paint), _figures(status, width, paint), _pipelines(status, width, paint)]
    parts += [_shards(status, width, paint), _events(status, width, paint, num_events)]
    shown = [list(part) for part in parts]
    return [line for index, part in enumerate(shown) if part for line in (["", *part] if index else part)]


def _head(status: GetStatusResponse, width: int, paint: Paint) -> Iterator[str]:
    state = state_name(status.state)
    number = status.plan.number
    plan = f"  plan {number.term}.{number.epoch}" if number.epoch else ""
    run = _fit(status.run_id, width - len(state) - len(plan) - 2)
    yield f"{paint('bold', run)}  {paint(_LOOKS.get(state, ''), state)}{paint('dim', plan)}"
    if why := status.reason or (status.waiting_for and f"waiting for {status.waiting_for}"):
        yield paint("warn", _fit(why, width))
    left = (status.last_step - status.version) * status.newest.tokens
    eta = f"  {format_seconds(left / status.tokens_per_second)} to go" if state == "training" and status.tokens_per_second else ""
    said = f" {status.version}/{status.last_step} steps{eta}"
    cells = max(4, width - len(said) - 2)
    full = cells * status.version // status.last_step if status.last_step else 0
    yield f"[{'#' * full}{'.' * (cells - full)}]{said}"[:width]


def _figures(status: GetStatusResponse, width: int, paint: Paint) -> Iterator[str]:
    newest = status.newest
    if not status.version:
        return
    if status.losses:
        spark = sparkline([point.loss for point in status.losses], width - 16)
        yield f"loss {paint('bold', f'{newest.loss:.4f}')}  {spark}"
    else:
        yield f"loss {paint('bold', f'{newest.loss:.4f}')}"
    lag = status.consistency if status.consistency == "bsp" else f"{status.consistency}, staleness {status.staleness}"
    pairs = [
        f"grad_norm {newest.grad_norm:.3f}",
        f"lr {newest.learning_rate:.2e}",
        *([f"val_loss {status.validation_loss:.4f}"] if status.validation_loss else []),
        f"tokens/s {status.tokens_per_second:,.0f}",
        *([f"goodput {100 * status.goodput:.1f} %"] if status.goodput else []),
        f"clocks within {status.clock_spread_steps} steps ({lag})",
        f"checkpoint {status.newest_checkpoint or 'none yet'}",
        *([f"skipped {status.skipped_steps}"] if status.skipped_steps else []),
        *([paint("warn", f"{status.under_replicated_chunks} chunks lack a copy")] if status.under_replicated_chunks else []),
    ]
    yield from _flow(pairs, width)


def _pipelines(status: GetStatusResponse, width: int, paint: Paint) -> Iterator[str]:
    plan = status.plan
    members = {each.member.incarnation: each for each in status.members}
    names = [member.incarnation for member in plan.members]
    for index, replica in enumerate(plan.replicas):
        lanes = ", ".join(_span(block.first, block.first + block.size) for block in replica.blocks)
        yield _fit(f"replica {index}, lanes {lanes}{' (shadow)' if replica.shadow else ''}", width)
        for stage, (worker, layers) in enumerate(zip(replica.workers, plan.stages, strict=False)):
            yield _seat(f"stage {stage}, layers {_span(layers.first, layers.end)}", names[worker], members, width, paint)
    seated = {names[worker] for replica in plan.replicas for worker in replica.workers}
    for each in status.members:
        if each.member.role == Role.ROLE_WORKER and each.member.incarnation not in seated:
            yield _seat("spare", each.member.incarnation, members, width, paint)


def _shards(status: GetStatusResponse, width: int, paint: Paint) -> Iterator[str]:
    members = {each.member.incarnation: each for each in status.members}
    shards = [member.incarnation for member in status.plan.members if member.role == Role.ROLE_SHARD]
    for index, (name, held) in enumerate(zip(shards, status.holdings, strict=False)):
        filling = f" +{held.learner} filling" if held.learner else ""
        yield _seat(
            f"shard {index}, {held.primary} primary {held.backup} backup{filling}", name, members, width, paint, indent=""
        )


def _events(status: GetStatusResponse, width: int, paint: Paint, num_events: int) -> Iterator[str]:
    for event in status.events[-num_events:] if num_events > 0 else ():
        at = time.strftime("%H:%M:%S", time.localtime(event.unix_seconds))
        yield f"{paint('dim', at)} {paint('warn' if event.is_warning else '', _fit(event.text, width - 9))}"


def _seat(what: str, name: str, members: dict[str, MemberStatus], width: int, paint: Paint, indent: str = "  ") -> str:
    """Who sits there and what it does, in columns while they fit."""
    member = members.get(name)
    if member is None:
        doing, look = "gone", "bad"
    elif member.leaving:
        doing, look = "leaving", "warn"
    elif member.lease_age_seconds > SILENT_SECONDS:
        doing, look = f"silent for {member.lease_age_seconds:.0f} s", "warn"
    else:
        doing, look = member.activity or "joined", "good"
    column = 30 if indent else 32
    left = _fit(f"{indent}{what}", width - 12)
    room = width - max(column, len(left)) - 2
    shown = _fit(doing, room)
    who = f"  {name}" if room >= len(shown) + len(name) + 2 else ""
    return f"{left:<{column}}  {paint(look, shown)}{paint('dim', who)}" if room > 0 else left


def _flow(pairs: list[str], width: int) -> Iterator[str]:
    """As many on a line as fit."""
    line = ""
    for pair in pairs:
        if line and _visible(line) + 2 + _visible(pair) > width:
            yield line
            line = ""
        line = f"{line}  {pair}" if line else pair
    yield line


def _visible(text: str) -> int:
    """Characters, without those that colour."""
    count = 0
    for index, part in enumerate(text.split("\x1b[")):
        count += len(part) if index == 0 else len(part.partition("m")[2])
    return count


def _fit(text: str, width: int) -> str:
    """Of one line, and no control character: what members say of themselves may not move the cursor."""
    plain = "".join(each if each.isprintable() else " " for each in text)
    return plain if len(plain) <= width else f"{plain[: max(0, width - 1)]}…"


def _span(first: int, end: int) -> str:
    return str(first) if end == first + 1 else f"{first}-{end - 1}"
