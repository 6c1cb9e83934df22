"""Messages between shards ↔ protobuf, with the tensors that go along as one run of bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain

from torch import Tensor

from ps_service.core.messages import Ack, Envelope, Message, Position, Record, Records, Refill, Replicate
from shardlane import wire
from shardlane.chunks import byte_view
from shardlane.errors import MalformedError
from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, Step, Version
from shardlane.partition import Layout
from shardlane.pb import ps_pb2, tensor_pb2
from shardlane.train_config import TrainConfig
from shardlane.turns import LaneClock, Turn, place_of


def record_to_wire(record: Record) -> ps_pb2.Record:
    return ps_pb2.Record(
        step=record.step,
        chunk=record.chunk,
        square_norm=record.square_norm,
        tokens=record.tokens,
        loss=record.loss,
        digest=record.digest,
        requests=record.requests,
        tally=wire.tally_to_wire(record.tally),
        turn=None if record.turn is None else ps_pb2.Turn(**asdict(record.turn)),
    )


def record_from_wire(record: ps_pb2.Record, layout: Layout, train: TrainConfig) -> Record:
    """Raises `MalformedError` for a chunk that the model does not have, for a tally of other sites and lanes than it has, for a
    turn where there is none, or of no lane, and for a step that never comes: who learnt one would forget those that do.
    """
    num_lanes, turn = train.lanes, record.turn
    if record.HasField("turn") != train.goes_by_turns or place_of(turn.number, num_lanes)[0] == num_lanes:
        raise MalformedError(f"a record of turn {turn.number} in a run of {num_lanes} lanes under {train.consistency}")
    wire.check_counts("a record", record.step, record.tokens, turn.number, turn.staleness, turn.clock_sum)
    if not train.goes_by_turns and record.step >= train.last_step:
        raise MalformedError(f"a record of step {record.step}; the run ends at {train.last_step}")
    chunk = chunk_id(record.chunk, len(layout.chunks))
    tally = wire.tally_from_wire(record.tally, num_lanes)
    if tally.tables != layout.num_sites(chunk):
        raise MalformedError(f"chunk {chunk} has {layout.num_sites(chunk)} sites; found a tally over {tally.tables}")
    return Record(
        Step(record.step),
        chunk,
        record.square_norm,
        record.tokens,
        record.loss,
        record.digest,
        tally,
        record.requests,
        Turn(Step(turn.number), turn.staleness, turn.clock_sum) if train.goes_by_turns else None,
    )


def chunk_id(chunk: int, num_chunks: int) -> ChunkId:
    """Raises `MalformedError` for a chunk that the model does not have."""
    if chunk >= num_chunks:
        raise MalformedError(f"chunk {chunk} is not one of the model's {num_chunks}")
    return ChunkId(chunk)


def merged(envelopes: Iterable[Envelope]) -> list[Envelope]:
    """The same said in fewer messages: acknowledgements of one step, and records, of one sender under one plan, as one each."""
    acks: dict[tuple[Incarnation, PlanNumber, int, Step], list[Ack]] = defaultdict(list)
    records: dict[tuple[Incarnation, PlanNumber, int], list[Records]] = defaultdict(list)
    others = []
    for envelope in envelopes:
        fence = (envelope.sender, envelope.plan, envelope.timeline)
        match envelope.message:
            case Ack() as ack:
                acks[*fence, ack.step].append(ack)
            case Records() as news:
                records[fence].append(news)
            case _:
                others.append(envelope)
    whole = [
        Envelope(*fence, Records(tuple(chain.from_iterable(each.records for each in news)))) for fence, news in records.items()
    ]
    whole += [
        Envelope(*key[:3], Ack(key[3], tuple(dict.fromkeys(chain.from_iterable(each.chunks for each in told)))))
        for key, told in acks.items()
    ]
    return others + whole


def to_wire(
    envelope: Envelope, tensors: Sequence[Tensor], *, run_id: RunId, receiver: Incarnation
) -> Iterator[wire.Framed[ps_pb2.DeliverRequest]]:
    """The pieces of one message. The first says what it is; the values of `tensors`, each fp32, follow one another."""
    header = ps_pb2.DeliverRequest(
        run_id=run_id,
        sender=envelope.sender,
        receiver=receiver,
        plan=wire.number_to_wire(envelope.plan),
        timeline=envelope.timeline,
    )
    _set_body(header, envelope.message)
    total = sum(4 * tensor.numel() for tensor in tensors)
    if not total:
        yield wire.Framed(header)
        return
    offset = 0
    for tensor in tensors:
        view = byte_view(tensor)
        for start, end in wire.payload_ranges(len(view)):
            header.slice.CopyFrom(tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, offset=offset + start, total=total))
            yield wire.Framed(header, view[start:end])
            header = ps_pb2.DeliverRequest()
        offset += len(view)


def _set_body(header: ps_pb2.DeliverRequest, message: Message) -> None:
    match message:
        case Replicate():
            header.replicate.record.CopyFrom(record_to_wire(message.record))
            header.replicate.previous.extend(record_to_wire(record) for record in message.previous)
            header.replicate.parameters_digest = message.parameters_digest
        case Ack():
            header.ack.CopyFrom(ps_pb2.Ack(step=message.step, chunks=message.chunks))
        case Records():
            header.records.records.extend(record_to_wire(record) for record in message.records)
        case Refill():
            refill = header.refill
            refill.chunk, refill.version, refill.optimizer_step = message.chunk, message.version, message.num_steps
            if message.closed is not None:
                refill.closed.CopyFrom(record_to_wire(message.closed))
            refill.previous.extend(record_to_wire(record) for record in message.previous)
            refill.clocks.extend(ps_pb2.LaneClock(**each._asdict()) for each in message.clocks)
        case Position():
            header.position.CopyFrom(ps_pb2.Position(chunk=message.chunk, version=message.version, closed=message.closed))


def from_wire(request: ps_pb2.DeliverRequest, layout: Layout, train: TrainConfig) -> Envelope:
    """Raises `MalformedError`."""
    num_chunks = len(layout.chunks)

    def one(message: ps_pb2.Record) -> Record:
        return record_from_wire(message, layout, train)

    def records(messages: Iterable[ps_pb2.Record]) -> tuple[Record, ...]:
        return tuple(map(one, messages))

    message: Message
    match request.WhichOneof("body"):
        case "replicate":
            body = request.replicate
            compared = body.parameters_digest
            message = Replicate(one(body.record), records(body.previous), bool(compared), compared)
        case "ack":
            if len(request.ack.chunks) > num_chunks:
                raise MalformedError(f"{len(request.ack.chunks)} chunks are acknowledged; the model has {num_chunks}")
            message = Ack(Step(request.ack.step), tuple(chunk_id(chunk, num_chunks) for chunk in request.ack.chunks))
        case "records":
            message = Records(records(request.records.records))
        case "refill":
            refill = request.refill
            closed = one(refill.closed) if refill.HasField("closed") else None
            if len(refill.clocks) != (train.lanes if train.goes_by_turns else 0):
                raise MalformedError(f"{len(refill.clocks)} clocks of {train.lanes} lanes under {train.consistency}")
            wire.check_counts("a refill", refill.version, refill.optimizer_step)
            clocks = tuple(LaneClock(each.taken, each.refused, Version(each.read)) for each in refill.clocks)
            if unsound := [each for each in clocks if not each.refused <= each.taken <= refill.version >= each.read]:
                raise MalformedError(f"a refill of version {refill.version} with a lane at {unsound[0]}")
            message = Refill(
                chunk_id(refill.chunk, num_chunks),
                Version(refill.version),
                closed,
                records(refill.previous),
                refill.optimizer_step,
                clocks,
            )
        case "position":
            where = request.position
            message = Position(chunk_id(where.chunk, num_chunks), Version(where.version), where.closed)
        case _:
            raise MalformedError("a message between shards says nothing that is known here")
    return Envelope(Incarnation(request.sender), wire.number_from_wire(request.plan), request.timeline, message)
