"""Every RPC of a cluster that trains meanwhile, under hostile calls: with TLS and without, under BSP and ASP.

Each call ends in time with a status and a reason, none is held for ever, memory does not grow, nothing of ours raises what it did
not mean to, and the run ends with the reference's digest.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from coordinator.core.events import Control
from coordinator.service import CALLERS as COORDINATOR_CALLERS
from ps_service.peers import CALLERS as SHARD_CALLERS
from shardlane import config as configs
from shardlane import rpc
from shardlane.certificates import write_certificates
from shardlane.cli.reference import order_of
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.ids import PROTOCOL_VERSION
from shardlane.metrics import Metrics
from shardlane.pb import coordinator_pb2, ps_pb2, tensor_pb2, worker_pb2
from shardlane.prepare import ensure_prepared
from shardlane.reference import Reference
from shardlane.tls import ROLES, Tls, name_of
from tests.cluster.fuzzing import ANSWER_SECONDS, WAIT_SECONDS, Ending, Fuzzer, Hostile, Knowledge, make, noises, services
from tests.cluster.lies import Truth, is_lie
from tests.cluster.test_memory import MIB, resident_bytes
from tests.cluster.threads import Cluster, digest_of, running
from worker_service.links import CALLERS as WORKER_CALLERS

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SHAPE = ["--cluster.stages", "2", "--cluster.replicas", "1", "--cluster.shards", "2", "--cluster.replication", "2"]
ENDLESS = [*SHAPE, "--train.max_steps", "1000000", "--validation.num_micro_batches", "0", "--numerics.determinism", "strict"]
CALLERS = {**COORDINATOR_CALLERS, **SHARD_CALLERS, **WORKER_CALLERS}
INVALID_ARGUMENT, RESOURCE_EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
PERMISSION_DENIED, UNAVAILABLE = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
CALLS_AT_ONCE = 6
SLACK_SECONDS = 10.0  # on a busy machine, after a deadline
GROWTH_MIB_MAX = 48  # of a round of hundreds of calls; each oversized one alone has 17
METHODS = sorted(method.name for service in services() for method in service.methods)
OURS_IN_FLIGHT_MAX = 24  # calls of the members themselves


class Bugs(logging.Handler):
    """Errors that gRPC logs with a traceback: what a servicer raised and did not mean to."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None and not issubclass(record.exc_info[0], grpc.RpcError):
            self.found.append(logging.Formatter().format(record))


@contextmanager
def without_bugs() -> Iterator[None]:
    bugs, log = Bugs(), logging.getLogger("grpc")
    log.addHandler(bugs)
    try:
        yield
    finally:
        log.removeHandler(bugs)
    assert not bugs.found, f"{len(bugs.found)} of them; the first: {bugs.found[0]}"


class Hunt:
    """A cluster, and what its enemy knows of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.run = cluster, cluster.coordinator.coordinator
        self.wait_for(4)
        plan = self.run.plan
        assert plan is not None
        self.members = frozenset(each.incarnation for each in plan.members)
        turns = cluster.run.config.train.goes_by_turns
        self.truth = Truth(cluster.run.run_id, self.members, plan.number, self.run.num_chunks, turns)
        self.servers = {
            "Coordinator": (cluster.coordinator.address, "coordinator"),
            "ParameterShard": (cluster.shards[0].address, "shard"),
            "PipelineWorker": (cluster.workers[1].address, "worker"),
        }

    def wait_for(self, num_steps: int) -> None:
        """As many more."""
        until, end = self.run.run.version + num_steps, time.monotonic() + 60
        while self.run.run.version < until:
            assert time.monotonic() < end, f"the run stands at version {self.run.run.version}"
            time.sleep(0.02)

    def knowledge(self, service: str) -> Knowledge:
        plan, shard, worker = self.run.plan, self.cluster.shards[0], self.cluster.workers[1]
        assert plan is not None
        layout, members = shard.shard.layout, sorted(self.members)
        words = {
            "run_id": [plan.run_id],
            "receiver": [worker.me if service == "PipelineWorker" else shard.me],
            **dict.fromkeys(("incarnation", "sender", "learner"), members),
            "address": sorted(plan.addresses.values()),
            "protocol_version": [PROTOCOL_VERSION],
            "timeline": [0],
            "term": [plan.number.term],
            "epoch": [plan.number.epoch],
            **{name: [0, 1, len(layout.chunks) - 1, len(layout.chunks)] for name in ("chunk", "chunks")},
            "total": [layout.chunks[0].num_bytes, layout.chunks[1].num_bytes, 16],
            "size": [1, 2, 4],
            "tables": [1],
        }
        return Knowledge(words, self.openings())

    def openings(self) -> dict[str, list[Message]]:
        """Streams that begin as a member's would, now, and are never whole."""
        plan, shard, worker, above = self.run.plan, self.cluster.shards[0], self.cluster.workers[1], self.cluster.workers[0]
        assert plan is not None
        layout, step = shard.shard.layout, int(self.run.run.version)
        number = tensor_pb2.PlanNumber(term=plan.number.term, epoch=plan.number.epoch)
        mine = [each for each in layout.chunks if plan.placements[each.id].primary == shard.me]
        others = [each for each in layout.chunks if plan.placements[each.id].primary != shard.me]
        pushes = [
            ps_pb2.PushRequest(
                run_id=plan.run_id,
                step=each_step,
                block=tensor_pb2.Block(first=each_step % 5 % 4 if self.truth.goes_by_turns else 0, size=1),
                chunk=chunk.id,
                tokens=64,
                slice=tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, total=chunk.num_bytes),
                payload=bytes(12),
            )
            for chunk in mine[:3]
            for each_step in (step, step + 1, 0, 2**63)
        ]
        tally = tensor_pb2.Tally(tables=1, runs=[tensor_pb2.LaneRun(size=4, least=1, most=1)])
        record = ps_pb2.Record(step=2**62, chunk=others[-1].id, tokens=512, tally=tally)
        if self.truth.goes_by_turns:
            record.turn.CopyFrom(ps_pb2.Turn(number=5, staleness=1, clock_sum=7))
        soon = [ps_pb2.Record() for _ in range(8)]  # by the time that one is sent, its step may be the open one
        for after, each in enumerate(soon):
            each.MergeFrom(record)
            each.step = step + after
        total = tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, total=others[-1].num_bytes)
        bodies = [
            {"replicate": ps_pb2.Replicate(record=record), "slice": total, "payload": bytes(16)},
            *({"replicate": ps_pb2.Replicate(record=each)} for each in [record, *soon]),
            {"refill": ps_pb2.Refill(chunk=0, version=3, closed=record)},
            {"refill": ps_pb2.Refill(chunk=0, version=3, clocks=[ps_pb2.LaneClock(taken=2**64 - 1)] * 4)},
            {"ack": ps_pb2.Ack(step=2**63, chunks=[0, 1])},
            {"position": ps_pb2.Position(chunk=0, version=2**64 - 1)},
        ]
        said = {"run_id": plan.run_id, "sender": self.cluster.shards[1].me, "receiver": shard.me, "plan": number}
        train, width = self.cluster.run.config.train, self.cluster.run.config.model.hidden_size
        shape = [train.micro_batch_size, train.seq_len, width]
        activation = worker_pb2.TransferRequest(
            **{**said, "sender": above.me, "receiver": worker.me, "plan": tensor_pb2.PlanNumber(term=1, epoch=plan.number.epoch)},
            step=2**40,
            kind=worker_pb2.TRANSFER_KIND_ACTIVATION,
            slice=tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, total=4 * shape[0] * shape[1] * shape[2], shape=shape),
            payload=bytes(16),
        )
        chunks = [coordinator_pb2.ChunkChecksums(chunk=0, checksums={"parameter": "0"})]
        me, far = {"incarnation": shard.me}, {"incarnation": worker.me, "version": 2**40}
        return {
            "Heartbeat": [
                coordinator_pb2.HeartbeatRequest(**far, plan=number),
                coordinator_pb2.HeartbeatRequest(**me, plan=number, diverged=range(200_000)),
            ],
            "ReportCheckpoint": [
                coordinator_pb2.ReportCheckpointRequest(**me, version=version, file=file, chunks=chunks, clocks=[0] * 4)
                for version, file in ((2**64 - 1, f"part-{shard.me}.safetensors"), (2**63, "../../x"))
            ],
            "ReportValidation": [coordinator_pb2.ReportValidationRequest(incarnation=worker.me, version=2**64 - 6, tokens=1)],
            "Push": pushes,
            "Deliver": [ps_pb2.DeliverRequest(**{**said, **body}) for body in bodies],
            "Transfer": [activation],
        }

    def calls(self, seed: int, number: int) -> Iterator[Hostile]:
        for service in services():
            fuzzer = Fuzzer(seed, self.knowledge(service.name))
            for method in service.methods:
                yield from (call for call in fuzzer.calls(method, number) if not is_lie(call, self.truth))

    def attack(self, seed: int, number: int, network: rpc.Network = rpc.PLAIN) -> list[Ending]:
        """The endings of about `number` calls of each method."""
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with ExitStack() as stack, ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
            channels = {}
            for service, (address, role) in self.servers.items():
                channel = (
                    grpc.insecure_channel(address, options)
                    if network.tls is None
                    else grpc.secure_channel(
                        address,
                        network.tls.channel_credentials(),
                        [*options, ("grpc.ssl_target_name_override", name_of(role))],
                    )
                )
                channels[service] = stack.enter_context(channel)
            calls = list(self.calls(seed, number))
            random.Random(seed).shuffle(calls)
            return list(pool.map(lambda call: make(channels[call.method.containing_service.name], call), calls))

    def make_noise(self, seed: int) -> None:
        for address, _ in self.servers.values():
            host, _, port = address.rpartition(":")
            with ExitStack() as stack:  # all at a time, so that what is left open stays open a while
                for noise in noises(seed):
                    connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
                    try:
                        connection.sendall(noise)
                    except OSError:
                        continue  # cut off in the midst of it

    def num_in_flight(self) -> int:
        """Calls that servers have begun and not ended."""
        metrics: list[Metrics] = [each.metrics for each in (*self.cluster.shards, *self.cluster.workers)]
        total: Counter[str] = Counter()
        for each in metrics:
            for family in each.registry.collect():
                for sample in family.samples:
                    total[sample.name] += int(sample.value)
        return total["grpc_server_started_total"] - total["grpc_server_handled_total"]

    def finish(self, tokens: TokenFolder) -> None:
        """The run goes on, and ends with what the reference has at that version."""
        self.wait_for(3)
        end = time.monotonic() + 60
        while (number := self.num_in_flight()) > OURS_IN_FLIGHT_MAX:
            assert time.monotonic() < end, f"{number} calls are still held"
            time.sleep(0.1)
        assert self.run.plan is not None and self.run.plan.number == self.truth.plan, self.run.plan.reason
        self.run.control(Control.STOP)
        self.cluster.wait()
        config, run_dir = self.cluster.run.config, self.cluster.run_dir
        version = int(self.run.run.version)
        turns = config.train.goes_by_turns
        oracle = Reference(
            config if turns else config.with_changes({"train.stop_at_step": version}),
            tokens,
            order=order_of(config, run_dir / "ledger.jsonl") if turns else None,
        )
        for _ in oracle.run():
            pass
        assert oracle.version == version
        assert oracle.digest() == digest_of(run_dir)


def judge(endings: list[Ending]) -> None:
    for each in endings:
        said = f"{each.method.full_name} ended with {each.code.name} after {each.seconds:.1f} s: {each.details[:200]!r}"
        assert each.seconds < (WAIT_SECONDS if each.waits else ANSWER_SECONDS) + SLACK_SECONDS, said
        assert each.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), said
        assert each.waits or each.code is not DEADLINE_EXCEEDED, said
        assert each.code is grpc.StatusCode.OK or each.details, said
        assert "Traceback" not in each.details and "metadata" not in each.details, said


@contextmanager
def hunting(tmp_path: Path, *changes: str, certs: Path | None = None) -> Iterator[Hunt]:
    config: Config = configs.load(TINY, [*ENDLESS, *changes])
    tokens = ensure_prepared(config, tmp_path, lambda line: None)
    networks = lambda role: rpc.PLAIN if certs is None else rpc.Network(Tls.in_folder(certs, role))  # noqa: E731
    with without_bugs(), running(config, tmp_path, network_of=networks) as cluster:
        hunt = Hunt(cluster)
        yield hunt
        hunt.finish(tokens)


def resting_bytes() -> int:
    """What is held after all: neither garbage, nor free memory that malloc keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def attack_and_weigh(hunt: Hunt, number: int, networks: Sequence[rpc.Network]) -> list[dict[str, set[grpc.StatusCode]]]:
    """A round from each of `networks`; the statuses of each method. What is kept of every round shows in the leanest, too: a busy
    machine holds more for a while of calls that it has not come to.
    """
    found, held = [], []
    for seed, network in enumerate(networks):
        endings = hunt.attack(seed, number, network)
        hunt.make_noise(seed)
        judge(endings)
        held.append(resting_bytes() / MIB)
        found.append({name: {each.code for each in endings if each.method.name == name} for name in METHODS})
    assert min(after - before for before, after in pairwise(held[1:])) < GROWTH_MIB_MAX, held
    return found


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_hostile_calls_in_plain_text(tmp_path: Path, consistency: str) -> None:
    with hunting(tmp_path, "--train.consistency", consistency) as hunt:
        rounds = attack_and_weigh(hunt, 24, [rpc.PLAIN] * 4)
    for name in METHODS:
        assert {INVALID_ARGUMENT, RESOURCE_EXHAUSTED} <= set().union(*(each[name] for each in rounds)), name


def test_hostile_calls_with_certificates_of_every_role_and_with_none(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    write_certificates(certs, days=2)
    with hunting(tmp_path, certs=certs) as hunt:
        refused = hunt.attack(0, 3)
        rounds = attack_and_weigh(hunt, 10, [rpc.Network(Tls.in_folder(certs, role)) for role in ROLES])
    assert {each.code for each in refused} <= {UNAVAILABLE, DEADLINE_EXCEEDED}
    judge(refused)
    for role, codes in zip(ROLES, rounds, strict=True):
        for method in (each for each in METHODS if role not in CALLERS.get(each, ROLES)):
            # gRPC itself refuses what is oversized, and a stream that says nothing is over before anybody is refused
            assert PERMISSION_DENIED in codes[method], (role, method)
            assert codes[method] <= {PERMISSION_DENIED, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}, (role, method, codes[method])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_many_more_hostile_calls(tmp_path: Path, consistency: str) -> None:
    with hunting(tmp_path, "--train.consistency", consistency) as hunt:
        attack_and_weigh(hunt, 300, [rpc.PLAIN] * 10)
