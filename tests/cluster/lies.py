"""What a fuzzer must not say: lies that keep all the rules, from which nothing is defended (SECURITY.md).

Whoever speaks for a member of the run, of the present plan and of a step that may be open, is believed. A fuzzer that knows a run
says such a thing sooner or later; that the weights change then is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message

from shardlane.ids import PlanNumber
from shardlane.pb import coordinator_pb2, worker_pb2
from tests.cluster.fuzzing import Hostile, reader

OPEN_STEPS = range(2, 1_000_000)  # the first two are closed when the fuzzing begins, and the run is over before the last
PAYLOAD_BYTES = 32  # fewer are no whole chunk, in any code, and no activation
_VALUES = (
    worker_pb2.TRANSFER_KIND_ACTIVATION,
    worker_pb2.TRANSFER_KIND_GRADIENT,
    worker_pb2.TRANSFER_KIND_VALIDATION,
)


@dataclass(frozen=True)
class Truth:
    """`goes_by_turns`: ASP, where no number is beyond the run's end."""

    run_id: str
    members: frozenset[str]
    plan: PlanNumber
    num_chunks: int
    goes_by_turns: bool

    def is_open(self, step: int) -> bool:
        return step in OPEN_STEPS or (self.goes_by_turns and 2 <= step < 1 << 63)


def is_lie(call: Hostile, truth: Truth) -> bool:
    """Whether it could be believed."""
    judge = _JUDGES.get(call.method.name)
    if judge is None:
        return False
    read, messages = reader(call.method), []
    for data in call.messages:
        try:
            messages.append(read(data))
        except DecodeError:
            continue
    size = sum(len(getattr(each, "payload", b"")) for each in messages)
    return any(judge(each, truth, size) for each in messages)


def _control(message: Message, truth: Truth, size: int) -> bool:
    return message.action in coordinator_pb2.ControlAction.values()[1:]


def _heartbeat(message: Message, truth: Truth, size: int) -> bool:
    says = message.leaving or message.steps or message.lane_seconds > 0 or message.caught_up
    return message.incarnation in truth.members and bool(says or 0 < len(message.diverged) <= truth.num_chunks)


def _checkpoint(message: Message, truth: Truth, size: int) -> bool:
    return message.incarnation in truth.members and not message.timeline and message.version < 1 << 63


def _push(message: Message, truth: Truth, size: int) -> bool:
    is_ours = message.run_id == truth.run_id and not message.timeline
    return is_ours and truth.is_open(message.step) and size >= PAYLOAD_BYTES


def _deliver(message: Message, truth: Truth, size: int) -> bool:
    if message.run_id != truth.run_id or message.timeline:
        return False
    if message.WhichOneof("body") == "records":
        return any(truth.is_open(each.step) for each in message.records.records)
    if message.sender not in truth.members or (message.plan.term, message.plan.epoch) != (truth.plan.term, truth.plan.epoch):
        return False
    replicated = message.replicate
    told = {
        "ack": lambda: [message.ack],
        "replicate": lambda: [*replicated.previous, *([replicated.record] if size >= PAYLOAD_BYTES else [])],
    }
    said: Sequence[Message] = told.get(message.WhichOneof("body") or "", list)()
    return any(truth.is_open(each.step) for each in said)  # type: ignore[attr-defined]


def _transfer(message: Message, truth: Truth, size: int) -> bool:
    if message.run_id != truth.run_id or message.sender not in truth.members:
        return False
    is_broken = message.kind in _VALUES and message.HasField("slice") and size < PAYLOAD_BYTES
    return bool(message.published) or not is_broken or message.step < OPEN_STEPS.stop


_JUDGES: dict[str, Callable[..., bool]] = {
    "Control": _control,
    "Heartbeat": _heartbeat,
    "ReportCheckpoint": _checkpoint,
    "Push": _push,
    "Deliver": _deliver,
    "Transfer": _transfer,
}
