"""Over loopback gRPC: a client of generated stubs against our shard, and our client against a server of generated stubs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from ps_service.instruments import ShardInstruments
from ps_service.peers import SERVICE
from ps_service.servicer import ShardServicer
from ps_service.shard import Shard
from shardlane import rpc, wire
from shardlane.codecs import Int8
from shardlane.config import Config, build
from shardlane.ids import Incarnation, PlanNumber, RunId, Timeline, Version
from shardlane.initialise import initial_chunk
from shardlane.metrics import Metrics
from shardlane.partition import Layout
from shardlane.pb import ps_pb2, ps_pb2_grpc, tensor_pb2
from shardlane.plan import REQUEST_STOP, Member, Placement, Plan
from shardlane.tally import LaneRun, Tally

ME, RUN = Incarnation("shard-me"), RunId("r")
CONFIG: Config = build(
    {
        "model": {"preset": "tiny"},
        "train": {"lanes": 2, "micro_batch_size": 1, "global_batch_size": 2, "max_steps": 5, "seq_len": 8},
        "optimizer": {"name": "sgd", "learning_rate": 0.5, "weight_decay": 0, "max_grad_norm": 0},
        "schedule": {"name": "constant"},
        "numerics": {"chunk_bytes": 16384},
    }
)
LAYOUT = Layout.of(CONFIG)
BOTH = tensor_pb2.Block(first=0, size=2)


class Served:
    def __init__(self, folder: Path, config: Config = CONFIG) -> None:
        self.shard = Shard(
            ME,
            config,
            run_id=RUN,
            checkpoint_path=folder,
            instruments=ShardInstruments(Metrics("shard")),
            report_checkpoint=lambda report: None,
            on_plan=lambda plan: None,
            on_milestone=lambda: None,
        )
        pools = {"Pull": ThreadPoolExecutor(2)}
        handlers = {SERVICE.full_name: rpc.handler(SERVICE, ShardServicer(self.shard), pools=pools)}
        self.server = rpc.Server("127.0.0.1:0", handlers)
        self.server.start()
        self.address = f"127.0.0.1:{self.server.port}"
        placements = tuple(Placement((ME,)) for _ in LAYOUT.chunks)
        self.shard.adopt(
            Plan(PlanNumber(1, 1), RUN, Timeline(0, Version(0)), (Member(ME, "shard", self.address),), (), (), placements)
        )
        self.channel = grpc.insecure_channel(self.address)
        self.stub = ps_pb2_grpc.ParameterShardStub(self.channel)

    def stop(self) -> None:
        self.channel.close()
        self.server.stop()
        self.shard.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.stop()


def contribution(
    chunk: int, values: np.ndarray, *, step: int = 0, block: tensor_pb2.Block = BOTH
) -> Iterator[ps_pb2.PushRequest]:
    data = values.astype("<f4").tobytes()
    for offset in range(0, len(data), 4096):
        yield ps_pb2.PushRequest(
            run_id=RUN,
            step=step,
            block=block,
            chunk=chunk,
            tokens=8 * block.size,
            slice=tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, offset=offset, total=len(data)),
            payload=data[offset : offset + 4096],
        )


def everything(value: float, step: int = 0) -> Iterator[ps_pb2.PushRequest]:
    for chunk in LAYOUT.chunks:
        yield from contribution(chunk.id, np.full(chunk.num_elements, value), step=step)


def pull(served: Served, chunk: int, version: int) -> torch.Tensor:
    pieces = list(served.stub.Pull(ps_pb2.PullRequest(run_id=RUN, version=version, chunks=[chunk]), timeout=20))
    assert {piece.outcome for piece in pieces} == {ps_pb2.PULL_OUTCOME_DATA}
    return torch.from_numpy(np.frombuffer(b"".join(piece.payload for piece in pieces), "<f4").copy())


def test_a_client_of_generated_stubs_pushes_and_pulls(served: Served) -> None:
    before = [initial_chunk(CONFIG, LAYOUT, chunk) for chunk in LAYOUT.chunks]
    assert torch.equal(pull(served, 3, 0), before[3])
    response = served.stub.Push(everything(16.0), timeout=20)
    assert (response.num_counted, response.num_duplicate, list(response.refused)) == (len(LAYOUT.chunks), 0, [])
    for chunk in (0, 5, len(LAYOUT.chunks) - 1):
        assert torch.allclose(pull(served, chunk, 1), before[chunk] - 0.5, atol=1e-6)  # 16 over 16 tokens, at rate 0.5
    assert served.stub.Push(everything(16.0), timeout=20).num_duplicate == len(LAYOUT.chunks)


def test_a_pull_of_a_past_version_is_superseded(served: Served) -> None:
    served.stub.Push(everything(1.0), timeout=20)
    (piece,) = served.stub.Pull(ps_pb2.PullRequest(run_id=RUN, version=0, chunks=[2]), timeout=20)
    assert (piece.outcome, piece.version) == (ps_pb2.PULL_OUTCOME_SUPERSEDED, 1)


def test_a_pull_while_a_plan_is_taken_up_is_answered_from_the_new_timeline(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once was told of a version that the roll-back had just undone, and its worker waited for the next one for ever."""
    before = pull(served, 2, 0)
    served.stub.Push(everything(1.0), timeout=20)
    old, answers = served.shard.plan, list[ps_pb2.PullResponse]()
    assert old is not None
    request = ps_pb2.PullRequest(run_id=RUN, timeline=1, version=0, chunks=[2])
    puller = threading.Thread(target=lambda: answers.extend(served.stub.Pull(request, timeout=20)))

    def in_the_midst_of_it(plan: Plan) -> None:
        puller.start()
        puller.join(0.5)  # as good as always time enough to be answered wrongly; the right answer comes after this

    monkeypatch.setattr(served.shard, "_set_outboxes", in_the_midst_of_it)
    served.shard.adopt(replace(old, number=PlanNumber(1, 2), timeline=Timeline(1, Version(0))))
    puller.join(20)
    assert {(piece.outcome, piece.version) for piece in answers} == {(ps_pb2.PULL_OUTCOME_DATA, 0)}
    assert b"".join(piece.payload for piece in answers) == before.numpy().tobytes()


def test_more_pulls_wait_than_there_are_threads_and_pushes_go_on(served: Served) -> None:
    waiting = [served.stub.Pull(ps_pb2.PullRequest(run_id=RUN, version=1, chunks=[c]), timeout=20) for c in range(6)]
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(list, call) for call in waiting]
        served.stub.Push(everything(1.0), timeout=20)
        assert all(piece.version == 1 for answer in answers for piece in answer.result(timeout=20))


def test_lanes_are_joined_along_the_tree(served: Served) -> None:
    half = tensor_pb2.Block(first=1, size=1)
    assert served.stub.Push(contribution(1, np.ones(LAYOUT.chunks[1].num_elements), block=half), timeout=20).num_counted == 1
    refused = served.stub.Push(contribution(1, np.ones(LAYOUT.chunks[1].num_elements)), timeout=20).refused[0]
    assert refused.outcome == ps_pb2.PUSH_OUTCOME_OVERLAPS
    assert [(block.first, block.size) for block in refused.missing] == [(0, 1)]


def test_a_gradient_that_is_not_finite_skips_the_step(served: Served) -> None:
    before = pull(served, 0, 0)
    served.stub.Push(everything(float("nan")), timeout=20)
    assert torch.equal(pull(served, 0, 1), before)
    (summary,) = served.shard.unacknowledged(10)
    assert summary.skipped


def test_the_coordinator_is_told_what_was_counted_and_nothing_of_a_timeline_that_is_over(served: Served) -> None:
    served.stub.Push(everything(1.0), timeout=20)
    (summary,) = served.shard.unacknowledged(10)
    assert wire.tally_from_wire(summary.tally, 2) == Tally(len(LAYOUT.chunks), (LaneRun(0, 2, 1, 1),))
    assert served.shard.plan is not None
    served.shard.adopt(replace(served.shard.plan, number=PlanNumber(1, 2), timeline=Timeline(1, Version(0))))
    assert served.shard.unacknowledged(10) == []


def test_what_the_coordinator_says_of_another_timeline_is_passed_over(served: Served) -> None:
    served.stub.Push(everything(1.0), timeout=20)
    served.shard.hear(7, num_told=1, requests=REQUEST_STOP)
    assert len(served.shard.unacknowledged(10)) == 1 and not served.shard._core.requests
    served.shard.hear(0, num_told=1, requests=REQUEST_STOP)
    assert served.shard.unacknowledged(10) == [] and served.shard._core.requests == REQUEST_STOP


def broken(**change: object) -> ps_pb2.PushRequest:
    """A first piece of chunk 1 with something wrong."""
    total = LAYOUT.chunks[1].num_bytes
    piece = next(contribution(1, np.ones(total // 4)))
    for name, value in change.items():
        target, _, field = name.rpartition("__")
        inner = getattr(piece, target) if target else piece
        inner.MergeFrom(type(inner)(**{field: value}))
    return piece


@pytest.mark.parametrize(
    ("piece", "code", "reason"),
    [
        (broken(chunk=999), grpc.StatusCode.INVALID_ARGUMENT, "chunk 999 is not one of the model's"),
        (broken(site=1), grpc.StatusCode.INVALID_ARGUMENT, "has 1 sites; found site 1"),
        (broken(run_id="other"), grpc.StatusCode.FAILED_PRECONDITION, "of run 'r', the message of run 'other'"),
        (broken(slice__offset=64), grpc.StatusCode.INVALID_ARGUMENT, "must begin at byte 0, found 64"),
        (broken(slice__total=64), grpc.StatusCode.INVALID_ARGUMENT, "bytes of fp32; found 64 of dtype 1"),
        (broken(slice__dtype=2), grpc.StatusCode.INVALID_ARGUMENT, "of dtype 2"),
        (broken(payload=b"abc"), grpc.StatusCode.INVALID_ARGUMENT, "multiples of 4"),
        (broken(payload=b"\0" * 20000), grpc.StatusCode.INVALID_ARGUMENT, "do not lie within"),
        (broken(), grpc.StatusCode.INVALID_ARGUMENT, "the stream ended"),
        (broken(tokens=2**63), grpc.StatusCode.INVALID_ARGUMENT, "tokens of 2 lanes, each of 8 a step at most"),
        (broken(slice__shape=range(100_000)), grpc.StatusCode.INVALID_ARGUMENT, "shape [0, 1, 2, 3]"),
        (broken(run_id="\N{CRAB}" * 1024), grpc.StatusCode.FAILED_PRECONDITION, "the message of run '\N{CRAB}"),
        (broken(block__size=3), grpc.StatusCode.INVALID_ARGUMENT, "no aligned block of 2 lanes"),
    ],
)
def test_a_bad_chunk_is_refused_with_a_reason_and_harms_nothing(
    served: Served, piece: ps_pb2.PushRequest, code: grpc.StatusCode, reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        served.stub.Push(iter([piece]), timeout=20)
    assert refused.value.code() == code
    assert reason in refused.value.details()
    assert served.stub.Push(everything(1.0), timeout=20).num_counted == len(LAYOUT.chunks)


def test_an_oversized_message_is_refused(served: Served) -> None:
    channel = grpc.insecure_channel(served.address, options=[("grpc.max_send_message_length", -1)])
    with pytest.raises(grpc.RpcError) as refused:
        ps_pb2_grpc.ParameterShardStub(channel).Push(iter([broken(payload=b"\0" * (17 << 20))]), timeout=20)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    channel.close()


def test_garbage_is_refused(served: Served) -> None:
    call = served.channel.stream_unary("/shardlane.ps.v1.ParameterShard/Push")
    for garbage in (b"\xff" * 40, b"\x7a\xff\xff\x7f", b"\x0b"):
        with pytest.raises(grpc.RpcError) as refused:
            call(iter([garbage]), timeout=20)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert served.stub.Push(everything(1.0), timeout=20).num_counted == len(LAYOUT.chunks)


def test_a_stream_without_a_message_is_answered(served: Served) -> None:
    assert not served.stub.Deliver(iter([]), timeout=20).HasField("plan")
    assert served.stub.Push(iter([]), timeout=20).num_counted == 0


# ---- coded gradients ---------------------------------------------------------------------------------------------------

CODED = CONFIG.with_changes({"communication.push": "int8", "communication.pull": "bf16", "communication.coded_elements_min": 512})
CODEC = Int8(stochastic=False)


@pytest.fixture
def coded(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, CODED)
    yield made
    made.stop()


def coded_piece(chunk: int, value: float, index: int) -> ps_pb2.PushRequest:
    """A lane's part of a chunk, in one piece, as the run's config has it."""
    num_elements = LAYOUT.chunks[chunk].num_elements
    values = torch.full((num_elements,), value)
    is_coded = LAYOUT.tensors[LAYOUT.chunks[chunk].tensor].num_elements >= 512
    data = CODEC.encode(values, 0).data.numpy().tobytes() if is_coded else values.numpy().tobytes()
    return ps_pb2.PushRequest(
        run_id=RUN,
        block=tensor_pb2.Block(first=index, size=1),
        chunk=chunk,
        tokens=8,
        codec=ps_pb2.CODEC_INT8 if is_coded else ps_pb2.CODEC_UNSPECIFIED,
        slice=tensor_pb2.Slice(
            dtype=tensor_pb2.D_TYPE_UINT8 if is_coded else tensor_pb2.D_TYPE_FLOAT32, offset=0, total=len(data)
        ),
        payload=data,
    )


def test_coded_gradients_are_added_in_fp32_and_parameters_travel_in_bf16(coded: Served) -> None:
    before = initial_chunk(CONFIG, LAYOUT, LAYOUT.chunks[1])
    pieces = (coded_piece(chunk.id, 8.0, index) for chunk in LAYOUT.chunks for index in (0, 1))
    assert coded.stub.Push(pieces, timeout=20).num_counted == 2 * len(LAYOUT.chunks)
    (piece,) = coded.stub.Pull(ps_pb2.PullRequest(run_id=RUN, version=1, chunks=[1]), timeout=20)
    assert piece.slice.dtype == tensor_pb2.D_TYPE_BFLOAT16
    pulled = torch.frombuffer(bytearray(piece.payload), dtype=torch.bfloat16)
    assert torch.equal(pulled, (before - 0.5).to(torch.bfloat16))  # 16 over 16 tokens, at rate 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codec": ps_pb2.CODEC_UNSPECIFIED}, "travels by codec 3"),
        ({"codec": ps_pb2.CODEC_BF16}, "travels by codec 3"),
        ({"block": BOTH}, "what rounds goes lane by lane"),
        ({"slice": tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_UINT8, total=7)}, "bytes of its code"),
        ({"slice": tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_INT32, total=CODEC.num_bytes(4096))}, "of dtype"),
        ({"payload": b"\0" * 100}, "the stream ended"),
        ({"payload": b"\xff\xff\x7f\xff" + b"\0" * (CODEC.num_bytes(4096) - 4)}, "the scale of a block"),
    ],
)
def test_a_coded_chunk_that_cannot_be_is_refused_with_a_reason(coded: Served, change: dict[str, Any], reason: str) -> None:
    assert LAYOUT.chunks[1].num_elements == 4096 or pytest.fail("the layout has changed")
    piece = coded_piece(1, 1.0, 0)
    spoilt = ps_pb2.PushRequest.FromString(piece.SerializeToString())
    for name, value in change.items():
        if isinstance(value, int | bytes):
            setattr(spoilt, name, value)
        else:
            getattr(spoilt, name).CopyFrom(value)
    with pytest.raises(grpc.RpcError) as refused:
        coded.stub.Push(iter([spoilt]), timeout=20)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT and reason in refused.value.details()
    assert coded.stub.Push(iter([piece]), timeout=20).num_counted == 1


def test_random_bytes_in_the_place_of_coded_chunks_are_counted_or_refused(coded: Served) -> None:
    chance = np.random.default_rng(5)
    for index in range(200):
        piece = coded_piece(1 + index % 3, 1.0, 0)
        noise = chance.bytes(len(piece.payload))
        piece.payload = noise if index % 2 else noise[: chance.integers(1, len(noise))]
        call = coded.stub.Push.future(iter([piece]), timeout=20)
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), call.details()
    assert coded.stub.Push(iter([coded_piece(9, 1.0, 1)]), timeout=20).num_counted == 1


class StubShard(ps_pb2_grpc.ParameterShardServicer):
    """Nothing of ours: remembers what was pushed and answers pulls from memory."""

    def __init__(self) -> None:
        self.pushed = b""
        self.headers: list[ps_pb2.PushRequest] = []
        self.done = threading.Event()

    def Push(self, request_iterator: Iterator[ps_pb2.PushRequest], context: object) -> ps_pb2.PushResponse:
        for request in request_iterator:
            self.pushed += request.payload
            self.headers.append(request)
        return ps_pb2.PushResponse(num_counted=1)

    def Pull(self, request: ps_pb2.PullRequest, context: object) -> Iterator[ps_pb2.PullResponse]:
        for chunk in request.chunks:
            yield ps_pb2.PullResponse(chunk=chunk, version=request.version, outcome=1, payload=bytes([chunk]) * 8)


def test_our_client_talks_to_a_server_of_generated_stubs() -> None:
    servicer = StubShard()
    server = grpc.server(ThreadPoolExecutor(2))
    ps_pb2_grpc.add_ParameterShardServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = rpc.connect(f"127.0.0.1:{port}")
    client = rpc.Client(channel, SERVICE)
    values = memoryview(np.arange(1000, dtype="<f4")).cast("B")
    pieces = [
        wire.Framed(ps_pb2.PushRequest(run_id=RUN, step=7), values[:2000]),
        wire.Framed(ps_pb2.PushRequest(), values[2000:]),
    ]
    assert client.Push(iter(pieces), timeout=20).num_counted == 1
    assert servicer.pushed == values.tobytes()
    assert servicer.headers[0].step == 7
    pulled = list(client.Pull(ps_pb2.PullRequest(version=3, chunks=[5, 9]), timeout=20))
    assert [(each.header.chunk, each.header.version, bytes(each.payload)) for each in pulled] == [
        (5, 3, b"\5" * 8),
        (9, 3, b"\t" * 8),
    ]
    channel.close()
    server.stop(None).wait()
