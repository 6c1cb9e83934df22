"""What no shard says to another is refused with a reason, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from shardlane import wire
from shardlane.errors import MalformedError
from shardlane.pb import ps_pb2, tensor_pb2
from tests.ps_service.test_interoperation import LAYOUT, ME, RUN, Served, everything


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.stop()


def delivery(**body: Message) -> ps_pb2.DeliverRequest:
    return ps_pb2.DeliverRequest(run_id=RUN, sender="shard-else", receiver=ME, plan={"term": 1, "epoch": 1}, **body)


def record(step: int, **more: Any) -> ps_pb2.Record:
    tally = tensor_pb2.Tally(tables=1, runs=[tensor_pb2.LaneRun(first=0, size=2, least=1, most=1)])
    return ps_pb2.Record(step=step, chunk=1, tally=tally, **more)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (delivery(replicate=ps_pb2.Replicate(record=record(0))), "Replicate comes with 1 tensors of its chunk; found 0"),
        (delivery(refill=ps_pb2.Refill(chunk=1, version=1)), "Refill comes with 1 tensors of its chunk; found 0"),
        (delivery(refill=ps_pb2.Refill(chunk=1, version=1, closed=record(1))), "Refill comes with 2 tensors"),
        (delivery(records=ps_pb2.Records(records=[record(5)])), "a record of step 5; the run ends at 5"),
        (delivery(records=ps_pb2.Records(records=[record(2**64 - 1)])), "is beyond any count"),
        (delivery(records=ps_pb2.Records(records=[record(0, tokens=2**63)])), "is beyond any count"),
        (delivery(ack=ps_pb2.Ack(step=0, chunks=[0] * 1000)), "1000 chunks are acknowledged; the model has"),
        (delivery(refill=ps_pb2.Refill(chunk=1, version=2**63)), "a refill: 9223372036854775808 is beyond any count"),
    ],
)
def test_what_no_shard_says_is_refused_and_harms_nothing(served: Served, message: ps_pb2.DeliverRequest, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        served.stub.Deliver(iter([message]), timeout=20)
    assert (refused.value.code(), reason in refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert served.stub.Push(everything(1.0), timeout=20).num_counted == len(LAYOUT.chunks)


def test_a_shape_of_many_dimensions_is_not_multiplied_out() -> None:
    piece = tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, total=4, shape=[2**32 - 1] * 1_000_000)
    with pytest.raises(MalformedError, match="a shape of 1000000 dimensions; at most 3"):
        wire.check_slice(piece, bytes(4), total_bytes_max=4, what="it")
