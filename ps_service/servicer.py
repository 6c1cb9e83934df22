"""Wire in, one call, wire out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import torch
from torch import Tensor

from ps_service import envelopes
from ps_service.core.messages import Answer, Contribution, Envelope, Message, Outcome, Refill, Replicate
from ps_service.shard import Shard
from shardlane import rpc, wire
from shardlane.chunks import Assembly, byte_view, dtype_to_wire
from shardlane.codecs import Codec
from shardlane.communication import codec_for, pull_dtype
from shardlane.errors import MalformedError, NotReadyError, StaleError, TooLargeError
from shardlane.ids import ChunkId, Lane, PlanNumber, SiteIndex, Step, Version
from shardlane.lanes import Block
from shardlane.pb import ps_pb2, tensor_pb2
from shardlane.turns import place_of

CHUNKS_MAX = 65_536  # that a pull may ask for
REFUSALS_MAX = 65_536  # that the answer to one stream of pushes tells of

_OUTCOMES = {
    Outcome.COUNTED: ps_pb2.PUSH_OUTCOME_COUNTED,
    Outcome.DUPLICATE: ps_pb2.PUSH_OUTCOME_DUPLICATE,
    Outcome.OVERLAPS: ps_pb2.PUSH_OUTCOME_OVERLAPS,
    Outcome.NOT_YET: ps_pb2.PUSH_OUTCOME_NOT_YET,
    Outcome.NOT_OWNER: ps_pb2.PUSH_OUTCOME_NOT_OWNER,
    Outcome.STALE: ps_pb2.PUSH_OUTCOME_STALE,
}


@dataclass(slots=True)
class Arriving:
    """A contribution of which the first pieces are here. `assembly` is None when it is refused: its values are passed over."""

    contribution: Contribution
    answer: Answer
    assembly: Assembly | None
    codec: Codec | None  # None: fp32
    num_bytes_due: int


class ShardServicer:
    """`shardlane.ps.v1.ParameterShard` over one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._layout = shard.layout
        self._num_lanes = shard.config.train.lanes
        self._lane_tokens = shard.config.train.lane_tokens
        self._instruments = shard.instruments

    # ---- push ----------------------------------------------------------------------------------------------------------

    def Push(self, pieces: Iterator[wire.Framed[ps_pb2.PushRequest]], context: grpc.ServicerContext) -> ps_pb2.PushResponse:
        response = ps_pb2.PushResponse()
        arriving: Arriving | None = None
        for piece in pieces:
            header = piece.header
            if arriving is None:
                arriving = self._begin(header, piece.payload)
            elif self._contribution(header) != arriving.contribution:
                raise MalformedError(f"chunk {header.chunk} begins before chunk {arriving.contribution.chunk} is whole")
            wire.check_slice(
                header.slice, piece.payload, total_bytes_max=wire.PAYLOAD_BYTES_MAX * 2, what=f"chunk {header.chunk}"
            )
            if arriving.assembly is not None:
                arriving.assembly.add(header.slice, piece.payload)
            arriving.num_bytes_due -= len(piece.payload)
            if arriving.num_bytes_due <= 0:
                self._finish(arriving, response)
                arriving = None
        if arriving is not None:
            raise MalformedError(
                f"the stream ended {arriving.num_bytes_due} bytes before chunk {arriving.contribution.chunk} was whole"
            )
        if any(each.outcome in (ps_pb2.PUSH_OUTCOME_NOT_OWNER, ps_pb2.PUSH_OUTCOME_STALE) for each in response.refused):
            self._attach_plan(response)
        return response

    def _contribution(self, header: ps_pb2.PushRequest) -> Contribution:
        chunk = envelopes.chunk_id(header.chunk, len(self._layout.chunks))
        if header.site >= self._layout.num_sites(chunk):
            raise MalformedError(f"chunk {chunk} has {self._layout.num_sites(chunk)} sites; found site {header.site}")
        block = wire.block_from_wire(header.block, self._num_lanes)
        if header.tokens > block.size * self._lane_tokens:
            raise MalformedError(f"{header.tokens} tokens of {block.size} lanes, each of {self._lane_tokens} a step at most")
        if self._shard.config.train.goes_by_turns and block != Block(Lane(place_of(header.step, self._num_lanes)[0]), 1):
            raise MalformedError(f"turn {header.step} is not of lanes {block.first}..{block.first + block.size - 1} alone")
        return Contribution(
            header.timeline,
            Step(header.step),
            block,
            SiteIndex(header.site),
            chunk,
            header.tokens,
            header.loss,
        )

    def _begin(self, header: ps_pb2.PushRequest, payload: wire.Buffer) -> Arriving:
        self._check_run(header.run_id)
        contribution = self._contribution(header)
        chunk = self._layout.chunks[contribution.chunk]
        codec = codec_for(self._shard.config.communication, self._layout.tensors[chunk.tensor], contribution.site)
        if codec and codec.is_lossless and header.codec == ps_pb2.CODEC_UNSPECIFIED:
            codec = None  # as they are is as good
        number = codec.number if codec else ps_pb2.CODEC_UNSPECIFIED
        if header.codec != number or (codec and not codec.is_lossless and contribution.block.size > 1):
            raise MalformedError(
                f"chunk {chunk.id} travels by codec {number} in this run, and what rounds goes lane by lane;"
                f" found codec {header.codec} and {contribution.block.size} lanes"
            )
        num_bytes, dtype = (codec.num_bytes(chunk.num_elements), torch.uint8) if codec else (chunk.num_bytes, torch.float32)
        total = header.slice.total
        is_of_size = total <= num_bytes if codec and codec.is_lossless else total == num_bytes
        if not is_of_size or header.slice.dtype != dtype_to_wire(dtype) or header.slice.shape:
            raise MalformedError(
                f"chunk {chunk.id} has {num_bytes} bytes of {'its code' if codec else 'fp32'};"
                f" found {total} of dtype {header.slice.dtype}, shape {list(header.slice.shape[:4])}"
            )
        if header.slice.offset:
            raise MalformedError(f"chunk {chunk.id} must begin at byte 0, found {header.slice.offset}")
        answer = self._shard.judge(contribution)
        assembly = None
        if answer.outcome is Outcome.COUNTED:
            assembly = Assembly(self._shard.store.pool.take(total // dtype.itemsize, dtype), f"chunk {chunk.id}")
        return Arriving(contribution, answer, assembly, codec, total)

    def _finish(self, arriving: Arriving, response: ps_pb2.PushResponse) -> None:
        contribution, answer = arriving.contribution, arriving.answer
        if arriving.assembly is not None:
            answer = self._shard.push(contribution, self._values_of(arriving.assembly.tensor, arriving))
        self._instruments.contributions.labels(answer.outcome.value).inc()
        if answer.outcome is Outcome.COUNTED:
            assert arriving.assembly is not None
            response.num_counted += 1
            self._instruments.pushed_bytes.inc(arriving.assembly.num_bytes)
        elif answer.outcome is Outcome.DUPLICATE:
            response.num_duplicate += 1
        elif len(response.refused) >= REFUSALS_MAX:
            raise TooLargeError(f"a stream of more than {REFUSALS_MAX} contributions that are refused")
        else:
            response.refused.add(
                step=contribution.step,
                chunk=contribution.chunk,
                site=contribution.site,
                block=wire.block_to_wire(contribution.block),
                outcome=_OUTCOMES[answer.outcome],
                missing=[wire.block_to_wire(block) for block in answer.missing],
            )

    def _values_of(self, received: Tensor, arriving: Arriving) -> Tensor:
        """fp32 [num_elements] from the pool. Raises `MalformedError`."""
        if arriving.codec is None:
            return received
        pool = self._shard.store.pool
        values = pool.take(self._layout.chunks[arriving.contribution.chunk].num_elements)
        try:
            arriving.codec.decode(received, values)
        except MalformedError as error:
            pool.give(values)
            raise MalformedError(f"chunk {arriving.contribution.chunk}: {error}") from error
        finally:
            pool.give(received)
        return values

    # ---- pull ----------------------------------------------------------------------------------------------------------

    def Pull(self, request: ps_pb2.PullRequest, context: grpc.ServicerContext) -> Iterator[wire.Framed[ps_pb2.PullResponse]]:
        deadline = time.monotonic() + rpc.WAIT_SECONDS
        self._check_run(request.run_id)
        if len(request.chunks) > CHUNKS_MAX:
            raise MalformedError(f"{len(request.chunks)} chunks asked for in one pull; at most {CHUNKS_MAX}")
        plan, generation = self._shard.serving()
        if plan is None:
            raise NotReadyError("this shard has no plan yet")
        waiting = dict.fromkeys(envelopes.chunk_id(chunk, len(self._layout.chunks)) for chunk in request.chunks)
        outcome = ps_pb2.PULL_OUTCOME_STALE if request.timeline != plan.timeline.id else ps_pb2.PULL_OUTCOME_NOT_OWNER
        for chunk in list(waiting):
            if request.timeline != plan.timeline.id or plan.placements[chunk].primary != self._shard.me:
                del waiting[chunk]
                refusal = ps_pb2.PullResponse(chunk=chunk, outcome=outcome)
                self._attach_plan(refusal)
                yield wire.Framed(refusal)
        version = Version(request.version)
        while waiting and context.is_active():
            ready = self._shard.publications.wait_any(waiting, version, generation=generation, deadline=deadline)
            if not ready:
                return
            for chunk in ready:
                del waiting[chunk]
                yield from self._chunk(chunk, version)

    def _chunk(self, chunk: ChunkId, version: Version) -> Iterator[wire.Framed[ps_pb2.PullResponse]]:
        """The version was published; by now the chunk may be past it, or gone with a plan: then it is asked for again."""
        with self._shard.store.parameter_of(chunk, version) as found:
            if found is None:
                return
            if found.parameter is None:
                superseded = ps_pb2.PULL_OUTCOME_SUPERSEDED
                yield wire.Framed(ps_pb2.PullResponse(chunk=chunk, version=found.version, outcome=superseded))
                return
            header = ps_pb2.PullResponse(chunk=chunk, version=version, outcome=ps_pb2.PULL_OUTCOME_DATA, refused=found.refused)
            with self._as_it_travels(chunk, found.parameter) as values:
                view = byte_view(values)
                dtype = tensor_pb2.DType.Name(dtype_to_wire(values.dtype))
                for start, end in wire.payload_ranges(len(view)):
                    header.slice.CopyFrom(tensor_pb2.Slice(dtype=dtype, offset=start, total=len(view)))
                    yield wire.Framed(header, view[start:end])
                self._instruments.pulled_bytes.inc(len(view))

    @contextmanager
    def _as_it_travels(self, chunk: ChunkId, parameter: Tensor) -> Iterator[Tensor]:
        """`parameter` itself, or a copy in fewer bits."""
        tensor = self._layout.tensors[self._layout.chunks[chunk].tensor]
        dtype = pull_dtype(self._shard.config.communication, tensor)
        if dtype == parameter.dtype:
            yield parameter
            return
        values = self._shard.store.pool.take(parameter.numel(), dtype).copy_(parameter)
        try:
            yield values
        finally:
            self._shard.store.pool.give(values)

    # ---- between shards ------------------------------------------------------------------------------------------------

    def Deliver(
        self, pieces: Iterator[wire.Framed[ps_pb2.DeliverRequest]], context: grpc.ServicerContext
    ) -> ps_pb2.DeliverResponse:
        response = ps_pb2.DeliverResponse()
        senders_plan: PlanNumber | None = None
        for piece in pieces:
            header = piece.header
            self._check_run(header.run_id)
            if header.receiver != self._shard.me:
                raise StaleError(f"{header.receiver} is gone; {self._shard.me} is here now")
            envelope = envelopes.from_wire(header, self._layout, self._shard.config.train)
            senders_plan = envelope.plan
            values = self._values(envelope, piece, pieces) if header.slice.total else []
            self._check_number(envelope.message, len(values))
            self._shard.deliver(envelope, values)
        plan = self._shard.plan
        if plan is not None and senders_plan is not None and senders_plan < plan.number:
            self._attach_plan(response)
        return response

    def _values(
        self, envelope: Envelope, first: wire.Framed[ps_pb2.DeliverRequest], rest: Iterator[wire.Framed[ps_pb2.DeliverRequest]]
    ) -> Sequence[Tensor]:
        """The tensors that come with a message: a replicated sum, or a chunk's parameters, states and, if closed, sum."""
        match envelope.message:
            case Replicate(record=record):
                chunk = self._layout.chunks[record.chunk]
            case Refill(chunk=refilled):
                chunk = self._layout.chunks[refilled]
            case _:
                raise MalformedError(
                    f"{type(envelope.message).__name__} brings no values; found {first.header.slice.total} bytes"
                )
        num_tensors_max = 1 + len(self._shard.store.names)  # and a sum
        what = f"the values of chunk {chunk.id}"
        wire.check_slice(first.header.slice, first.payload, total_bytes_max=chunk.num_bytes * num_tensors_max, what=what)
        if first.header.slice.total % chunk.num_bytes:
            raise MalformedError(f"{what}: {first.header.slice.total} bytes are not whole tensors of {chunk.num_bytes}")
        assembly = Assembly(self._shard.store.pool.take(first.header.slice.total // 4), what)
        if isinstance(envelope.message, Refill):
            self._instruments.refilled_bytes.inc(first.header.slice.total)
        piece = first
        while not assembly.add(piece.header.slice, piece.payload):
            following = next(rest, None)
            if following is None:
                raise MalformedError(f"{what}: the stream ended early")
            piece = following
            wire.check_slice(piece.header.slice, piece.payload, total_bytes_max=chunk.num_bytes * num_tensors_max, what=what)
        if assembly.tensor.numel() == chunk.num_elements:
            return [assembly.tensor]
        return [part.clone() for part in assembly.tensor.split(chunk.num_elements)]

    def _check_number(self, message: Message, found: int) -> None:
        """Of tensors that came along: a state that was taken up by halves could not be mended."""
        expected = 0
        if isinstance(message, Replicate):
            expected = 1
        elif isinstance(message, Refill):
            expected = len(self._shard.store.names) + (message.closed is not None)
        if found != expected:
            raise MalformedError(f"{type(message).__name__} comes with {expected} tensors of its chunk; found {found}")

    def _check_run(self, run_id: str) -> None:
        if run_id != self._shard.run_id:
            raise StaleError(f"this shard is of run {self._shard.run_id!r}, the message of run {run_id!r}")

    def _attach_plan(self, response: ps_pb2.PushResponse | ps_pb2.PullResponse | ps_pb2.DeliverResponse) -> None:
        if self._shard.plan is not None:
            response.plan.CopyFrom(wire.plan_to_wire(self._shard.plan))
