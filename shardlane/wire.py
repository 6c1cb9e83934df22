"""Protobuf messages ↔ what this project works with. No torch here: the coordinator loads this module too.

A message that carries tensor values has `bytes payload = 15`. gRPC's generated classes copy that field twice on each side;
`encode` and `decode` copy it once and not at all, and keep the declared wire format: a message of generated code is read
(unknown fields, any order, repeated scalars: the last one wins) and ours is read by generated code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from shardlane.errors import MalformedError, TooLargeError
from shardlane.ids import ChunkId, Incarnation, Lane, PlanNumber, RunId, Timeline, Version
from shardlane.lanes import Block, is_block
from shardlane.partition import StageLayers
from shardlane.pb import coordinator_pb2, tensor_pb2
from shardlane.plan import Member, Placement, Plan, Replica
from shardlane.tally import LaneRun, Tally, are_runs

PAYLOAD_FIELD = 15
PAYLOAD_BYTES = 4 << 20
PAYLOAD_BYTES_MAX = 8 << 20
DIMENSIONS_MAX = 3
COUNT_MAX = (1 << 63) - 1  # of steps, versions, tokens: what is counted never gets there, and SQLite keeps no more
MESSAGE_BYTES_MAX = 16 << 20  # of any message: a plan of 65,536 chunks fits

H = TypeVar("H", bound=Message)

Buffer = bytes | bytearray | memoryview


class _HasPayload(Protocol):
    payload: bytes


@dataclass(frozen=True, slots=True)
class Framed(Generic[H]):
    """A message apart from its payload. `header.payload` is empty; `payload` may alias the received bytes."""

    header: H
    payload: Buffer = b""


def has_payload(message_type: type[Message]) -> bool:
    """Whether a message type carries tensor values by the convention above."""
    field = message_type.DESCRIPTOR.fields_by_number.get(PAYLOAD_FIELD)
    return field is not None and field.name == "payload"


def encode(framed: Framed[Any]) -> bytes:
    """The message's wire format: the header as generated code writes it, then the payload field."""
    size = len(framed.payload)
    header = framed.header.SerializeToString()
    if not size:
        return bytes(header)
    return b"".join((header, _PAYLOAD_TAG, _varint(size), framed.payload))


def decoder(message_type: type[H]) -> Callable[[bytes], Framed[H]]:
    """A deserializer whose payload is a view of the received bytes. Raises `MalformedError`."""

    def decode(data: bytes) -> Framed[H]:
        view = memoryview(data)
        payload: Buffer = b""
        kept: list[memoryview] = []
        position = start = 0
        end = len(data)
        while position < end:
            field_start = position
            tag, position = _read_varint(data, position)
            kind = tag & 7
            if kind == 2:
                size, position = _read_varint(data, position)
                if size > end - position:
                    raise MalformedError(
                        f"{message_type.DESCRIPTOR.name}: a field of {size} bytes ends beyond the message's {end}"
                    )
                if tag >> 3 == PAYLOAD_FIELD:
                    payload = view[position : position + size]
                    kept.append(view[start:field_start])
                    start = position + size
                position += size
            elif kind == 0:
                _, position = _read_varint(data, position)
            elif kind in (1, 5):
                position += 8 if kind == 1 else 4
            else:
                raise MalformedError(f"{message_type.DESCRIPTOR.name}: wire type {kind} at byte {field_start}")
        kept.append(view[start:end])
        try:
            header = message_type.FromString(b"".join(kept))
        except DecodeError as error:
            raise MalformedError(f"{message_type.DESCRIPTOR.name}: {error}") from error
        return Framed(header, payload)

    return decode


_PAYLOAD_TAG = bytes([PAYLOAD_FIELD << 3 | 2])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    try:
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise MalformedError("a varint of more than ten bytes")
    except IndexError:
        raise MalformedError("the message ends inside a varint") from None


# ---- slices -----------------------------------------------------------------------------------------------------------

ELEMENT_BYTES: dict[int, int] = {
    tensor_pb2.D_TYPE_FLOAT32: 4,
    tensor_pb2.D_TYPE_BFLOAT16: 2,
    tensor_pb2.D_TYPE_FLOAT16: 2,
    tensor_pb2.D_TYPE_INT32: 4,
    tensor_pb2.D_TYPE_INT64: 8,
    tensor_pb2.D_TYPE_UINT8: 1,
}


def check_slice(piece: tensor_pb2.Slice, payload: Buffer, *, total_bytes_max: int, what: str) -> None:
    """Refuses a piece that cannot be part of a tensor of at most `total_bytes_max` bytes. Takes no memory.

    Raises `MalformedError` or `TooLargeError`, naming `what`.
    """
    element = ELEMENT_BYTES.get(piece.dtype)
    if element is None:
        raise MalformedError(f"{what}: dtype {piece.dtype} is unknown; expected one of fp32, bf16, fp16, int32, int64, uint8")
    if piece.total > total_bytes_max:
        raise TooLargeError(f"{what}: {piece.total} bytes announced, at most {total_bytes_max} expected")
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise TooLargeError(f"{what}: a payload of {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX} allowed")
    if piece.total == 0 or piece.total % element or piece.offset % element or len(payload) % element:
        raise MalformedError(
            f"{what}: offset {piece.offset}, length {len(payload)} and total {piece.total} must be multiples of {element}"
        )
    if not payload or piece.offset + len(payload) > piece.total:
        raise MalformedError(f"{what}: bytes {piece.offset}..{piece.offset + len(payload)} do not lie within 0..{piece.total}")
    if len(piece.shape) > DIMENSIONS_MAX:  # their product could be a number of millions of digits
        raise MalformedError(f"{what}: a shape of {len(piece.shape)} dimensions; at most {DIMENSIONS_MAX} expected")
    if piece.shape:
        size = element
        for extent in piece.shape:
            size *= extent
        if size != piece.total:
            raise MalformedError(f"{what}: shape {list(piece.shape)} takes {size} bytes, {piece.total} announced")


def payload_ranges(total: int) -> list[tuple[int, int]]:
    """(offset, end) of each message's values, for a tensor of `total` bytes."""
    return [(offset, min(offset + PAYLOAD_BYTES, total)) for offset in range(0, total, PAYLOAD_BYTES)]


def check_counts(what: str, *counts: int) -> None:
    """Raises `MalformedError`, naming `what`, for a number that no count reaches; one more of it might overflow."""
    if beyond := [each for each in counts if each > COUNT_MAX]:
        raise MalformedError(f"{what}: {beyond[0]} is beyond any count; at most {COUNT_MAX}")


# ---- nouns ------------------------------------------------------------------------------------------------------------


def block_to_wire(block: Block) -> tensor_pb2.Block:
    return tensor_pb2.Block(first=block.first, size=block.size)


def block_from_wire(block: tensor_pb2.Block, num_lanes: int) -> Block:
    """Raises `MalformedError` unless it is a node of the tree over `num_lanes` lanes."""
    if not is_block(block.first, block.size, num_lanes):
        raise MalformedError(f"lanes {block.first}+{block.size} are no aligned block of {num_lanes} lanes")
    return Block(Lane(block.first), block.size)


def tally_to_wire(tally: Tally) -> tensor_pb2.Tally:
    return tensor_pb2.Tally(tables=tally.tables, runs=[tensor_pb2.LaneRun(**run._asdict()) for run in tally.runs])


def tally_from_wire(tally: tensor_pb2.Tally, num_lanes: int) -> Tally:
    """Raises `MalformedError` unless it is over a table and names each of `num_lanes` lanes once, in order."""
    if len(tally.runs) > num_lanes:
        raise MalformedError(f"a tally of {len(tally.runs)} runs of lanes; the run has {num_lanes} lanes")
    runs = tuple(LaneRun(run.first, run.size, run.least, run.most) for run in tally.runs)
    if not tally.tables or not are_runs(runs, num_lanes):
        raise MalformedError(f"a tally over {tally.tables} tables that does not name each of {num_lanes} lanes once, in order")
    return Tally(tally.tables, runs)


def number_to_wire(number: PlanNumber) -> tensor_pb2.PlanNumber:
    return tensor_pb2.PlanNumber(term=number.term, epoch=number.epoch)


def number_from_wire(number: tensor_pb2.PlanNumber) -> PlanNumber:
    return PlanNumber(number.term, number.epoch)


_ROLES: dict[str, coordinator_pb2.Role] = {"shard": coordinator_pb2.ROLE_SHARD, "worker": coordinator_pb2.ROLE_WORKER}
_ROLE_NAMES: dict[int, Any] = {value: name for name, value in _ROLES.items()}


def role_to_wire(role: str) -> coordinator_pb2.Role:
    return _ROLES[role]


def role_from_wire(role: int) -> Any:
    """ "shard" or "worker". Raises `MalformedError`."""
    try:
        return _ROLE_NAMES[role]
    except KeyError:
        raise MalformedError(f"role {role} is unknown; expected 1 (shard) or 2 (worker)") from None


def _timeline_to_wire(timeline: Timeline) -> tensor_pb2.Timeline:
    return tensor_pb2.Timeline(id=timeline.id, version=timeline.version, digest=timeline.digest, clocks=timeline.clocks)


def _timeline_from_wire(message: tensor_pb2.Timeline) -> Timeline:
    return Timeline(message.id, Version(message.version), message.digest, tuple(message.clocks))


def plan_to_wire(plan: Plan) -> coordinator_pb2.Plan:
    index = {member.incarnation: position for position, member in enumerate(plan.members)}

    def indices(incarnations: Sequence[Incarnation]) -> list[int]:
        return [index[each] for each in incarnations]

    return coordinator_pb2.Plan(
        number=number_to_wire(plan.number),
        run_id=plan.run_id,
        timeline=_timeline_to_wire(plan.timeline),
        members=[
            coordinator_pb2.Member(incarnation=each.incarnation, role=role_to_wire(each.role), address=each.address)
            for each in plan.members
        ],
        stages=[coordinator_pb2.StageLayers(first=each.first, end=each.end) for each in plan.stages],
        replicas=[
            coordinator_pb2.Replica(
                workers=indices(each.workers),
                blocks=[block_to_wire(block) for block in each.blocks],
                formed=number_to_wire(each.formed),
                begins_at=each.begins_at,
                shadow=each.is_shadow,
            )
            for each in plan.replicas
        ],
        chunks=[
            coordinator_pb2.ChunkPlacement(
                in_sync=indices(each.in_sync), learner=0 if each.learner is None else 1 + index[each.learner]
            )
            for each in plan.placements
        ],
        digest=plan.digest,
        reason=plan.reason,
    )


def plan_from_wire(message: coordinator_pb2.Plan) -> Plan:
    """Raises `MalformedError` if it contradicts itself or its digest."""
    try:
        members = tuple(
            Member(Incarnation(each.incarnation), role_from_wire(each.role), each.address) for each in message.members
        )
        names = [member.incarnation for member in members]
        num_layers = max((each.end for each in message.stages), default=0)
        plan = Plan(
            number=number_from_wire(message.number),
            run_id=RunId(message.run_id),
            timeline=_timeline_from_wire(message.timeline),
            members=members,
            stages=tuple(StageLayers(each.first, each.end, num_layers) for each in message.stages),
            replicas=tuple(
                Replica(
                    tuple(names[i] for i in each.workers),
                    tuple(Block(Lane(b.first), b.size) for b in each.blocks),
                    number_from_wire(each.formed),
                    Version(each.begins_at),
                    each.shadow,
                )
                for each in message.replicas
            ),
            placements=tuple(
                Placement(tuple(names[i] for i in each.in_sync), names[each.learner - 1] if each.learner else None)
                for each in message.chunks
            ),
            reason=message.reason,
        )
    except IndexError as error:
        raise MalformedError("the plan names a member that it does not list") from error
    if any(not placement.in_sync for placement in plan.placements):
        chunk = next(ChunkId(i) for i, placement in enumerate(plan.placements) if not placement.in_sync)
        raise MalformedError(f"the plan gives chunk {chunk} to nobody")
    if plan.digest != message.digest:
        raise MalformedError(f"plan {plan.number} has digest {plan.digest[:12]}, its sender says {message.digest[:12]}")
    return plan
