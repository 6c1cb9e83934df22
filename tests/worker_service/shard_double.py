"""A parameter shard of a few lines over real gRPC: says what a test tells it to, remembers what it was sent."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch

from shardlane import rpc, wire
from shardlane.chunks import byte_view
from shardlane.ids import Incarnation, PlanNumber, RunId, Timeline, Version
from shardlane.lanes import Block, lane
from shardlane.partition import Chunk, StageLayers
from shardlane.pb import ps_pb2, tensor_pb2
from shardlane.plan import Member, Placement, Plan, Replica
from worker_service.pulls import SHARD

WORKER = Incarnation("worker-a")
Answer = Callable[[ps_pb2.PullRequest], Iterator[wire.Framed[ps_pb2.PullResponse]]]


def plan_of(addresses: list[str], num_chunks: int, epoch: int = 1) -> Plan:
    """Chunk c belongs to shard c mod S."""
    shards = [Incarnation(f"shard-{index}") for index in range(len(addresses))]
    members = [Member(shard, "shard", address) for shard, address in zip(shards, addresses, strict=True)]
    return Plan(
        PlanNumber(1, epoch),
        RunId("run"),
        Timeline(0, Version(0)),
        (Member(WORKER, "worker", "w:1"), *members),
        (StageLayers(0, 1, 1),),
        (Replica((WORKER,), (Block(lane(0).first, 4),), PlanNumber(1, epoch), Version(0)),),
        tuple(Placement((shards[chunk % len(shards)],)) for chunk in range(num_chunks)),
    )


def values(chunk: Chunk, version: int) -> torch.Tensor:
    return torch.arange(chunk.num_elements, dtype=torch.float32) + 1000 * chunk.id + 0.5 * version


class ShardDouble:
    """Publishes `version` of every chunk; `pull_answers` and `push_outcomes` come first, one a call or a contribution."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.version = 0
        self.changed = threading.Condition()
        self.pull_answers: deque[Answer] = deque()
        self.push_outcomes: deque[dict[str, Any]] = deque()
        self.plan: Plan | None = None  # attached to refusals
        self.pulls: list[list[int]] = []
        self.pushed: list[tuple[tuple[int, ...], torch.Tensor]] = []  # (step, chunk, site, first lane, lanes, tokens), values
        self.losses: dict[int, float] = {}
        self.hold_pushes = threading.Event()
        self.hold_pushes.set()
        self.bind = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        pools = {name: ThreadPoolExecutor(8) for name in ("Push", "Pull")}
        self.server = rpc.Server(self.bind, {SHARD.full_name: rpc.handler(SHARD, self, pools=pools)})
        self.server.start()
        self.bind = f"127.0.0.1:{self.server.port}"

    def publish(self, version: int) -> None:
        with self.changed:
            self.version = version
            self.changed.notify_all()

    def data(self, chunk: int, version: int, *, size: int = wire.PAYLOAD_BYTES) -> Iterator[wire.Framed[ps_pb2.PullResponse]]:
        tensor = values(self.chunks[chunk], version)
        view = byte_view(tensor)
        for start in range(0, len(view), size):
            piece = tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, offset=start, total=len(view))
            header = ps_pb2.PullResponse(chunk=chunk, version=version, outcome=ps_pb2.PULL_OUTCOME_DATA, slice=piece)
            yield wire.Framed(header, view[start : start + size])

    def refusal(self, chunk: int, outcome: Any, version: int = 0) -> wire.Framed[ps_pb2.PullResponse]:
        plan = None if self.plan is None else wire.plan_to_wire(self.plan)
        return wire.Framed(ps_pb2.PullResponse(chunk=chunk, outcome=outcome, version=version, plan=plan))

    def Pull(self, request: ps_pb2.PullRequest, context: grpc.ServicerContext) -> Iterator[wire.Framed[ps_pb2.PullResponse]]:
        self.pulls.append(list(request.chunks))
        if self.pull_answers:
            yield from self.pull_answers.popleft()(request)
            return
        with self.changed:
            while self.version < request.version and context.is_active():
                self.changed.wait(0.1)
        for chunk in request.chunks:
            if self.version > request.version:
                yield self.refusal(chunk, ps_pb2.PULL_OUTCOME_SUPERSEDED, self.version)
            else:
                yield from self.data(chunk, request.version)

    def Push(self, pieces: Iterator[wire.Framed[ps_pb2.PushRequest]], context: grpc.ServicerContext) -> ps_pb2.PushResponse:
        response, parts = ps_pb2.PushResponse(), bytearray()
        for piece in pieces:
            self.hold_pushes.wait(10)
            header = piece.header
            assert header.slice.offset == len(parts)
            parts += piece.payload
            if len(parts) < header.slice.total:
                continue
            key = (header.step, header.chunk, header.site, header.block.first, header.block.size, header.tokens)
            self.pushed.append((key, torch.frombuffer(parts, dtype=torch.float32)))
            self.losses[header.chunk] = header.loss
            parts = bytearray()
            outcome = self.push_outcomes.popleft() if self.push_outcomes else None
            if outcome is None:
                response.num_counted += 1
            else:
                response.refused.add(step=header.step, chunk=header.chunk, site=header.site, block=header.block, **outcome)
        if response.refused and self.plan is not None:
            response.plan.CopyFrom(wire.plan_to_wire(self.plan))
        return response

    def Deliver(self, pieces: Iterator[Any], context: grpc.ServicerContext) -> ps_pb2.DeliverResponse:
        raise NotImplementedError

    def stop(self) -> None:
        self.hold_pushes.set()
        self.server.stop(0)


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end, "waited for 10 s"
        time.sleep(0.005)
