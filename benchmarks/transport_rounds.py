"""A step's whole traffic: push gradients, SGD, pull parameters; ours beside torch.distributed.rpc and gloo.

`python -m benchmarks.transport_rounds ROLE NUM_BYTES PORT` is a process of it: `shard`, or `rpc0`, `rpc1`, `gloo0`, `gloo1`.
Rank 0 of a peer is asked for a round and answers with its seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.children import serve
from benchmarks.transport_paths import DEADLINE_SECONDS, SERVICE
from ps_service.instruments import ShardInstruments
from ps_service.servicer import ShardServicer
from ps_service.shard import Shard
from shardlane import rpc, wire
from shardlane.chunks import Assembly, byte_view
from shardlane.config import Config, build
from shardlane.ids import Incarnation, PlanNumber, RunId, Timeline, Version
from shardlane.metrics import Metrics
from shardlane.partition import Layout
from shardlane.pb import ps_pb2, tensor_pb2
from shardlane.plan import Member, Placement, Plan

LEARNING_RATE = 1e-3
ME, RUN = Incarnation("shard-0"), RunId("benchmark")
_HIDDEN = 512


def config_of(num_bytes: int) -> Config:
    """A model of about `num_bytes` of fp32: an embedding and a head, and a layer that hardly counts."""
    return build(
        {
            "model": {
                "vocab_size": num_bytes // (2 * 4 * _HIDDEN),
                "hidden_size": _HIDDEN,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
            },
            "train": {"lanes": 1, "micro_batch_size": 1, "global_batch_size": 1, "max_steps": 1_000_000, "seq_len": 8},
            "optimizer": {"name": "sgd", "learning_rate": LEARNING_RATE, "weight_decay": 0, "max_grad_norm": 0},
            "schedule": {"name": "constant"},
        }
    )


# ---- ours -------------------------------------------------------------------------------------------------------------


def serve_shard(num_bytes: int) -> None:
    config = config_of(num_bytes)
    layout = Layout.of(config)
    shard = Shard(
        ME,
        config,
        run_id=RUN,
        checkpoint_path=Path(tempfile.gettempdir()),  # no checkpoint is asked for
        instruments=ShardInstruments(Metrics("shard")),
        report_checkpoint=lambda report: None,
        on_plan=lambda plan: None,
        on_milestone=lambda: None,
    )
    pools = {"Push": ThreadPoolExecutor(2), "Pull": ThreadPoolExecutor(2)}
    server = rpc.Server("127.0.0.1:0", {SERVICE.full_name: rpc.handler(SERVICE, ShardServicer(shard), pools=pools)})
    server.start()
    address = f"127.0.0.1:{server.port}"
    placements = tuple(Placement((ME,)) for _ in layout.chunks)
    shard.adopt(Plan(PlanNumber(1, 1), RUN, Timeline(0, Version(0)), (Member(ME, "shard", address),), (), (), placements))
    serve({"port": server.port})
    shard.close()


class ShardRounds:
    """A worker's side: gradients out of one buffer, parameters into another. The next version is asked for early."""

    def __init__(self, port: int, num_bytes: int) -> None:
        self._layout = Layout.of(config_of(num_bytes))
        self.num_bytes = 4 * self._layout.num_parameters
        self._client = rpc.Client(rpc.connect(f"127.0.0.1:{port}"), SERVICE)
        self._gradients = torch.full((self._layout.num_parameters,), 1e-3)
        self._parameters = torch.zeros(self._layout.num_parameters)
        self._step = 0

    def run(self) -> float:
        """Seconds of one round."""
        began = time.perf_counter()
        chunks = [chunk.id for chunk in self._layout.chunks]
        request = ps_pb2.PullRequest(run_id=RUN, version=self._step + 1, chunks=chunks)
        pulled = self._client.Pull(request, timeout=DEADLINE_SECONDS)
        response = self._client.Push(self._pieces(), timeout=DEADLINE_SECONDS)
        if response.num_counted != len(chunks):
            raise RuntimeError(f"{response.num_counted} of {len(chunks)} chunks were counted")
        self._take(pulled)
        self._step += 1
        return time.perf_counter() - began

    def _parts(self, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        sizes = [chunk.num_elements for chunk in self._layout.chunks]
        return ((chunk.id, part) for chunk, part in zip(self._layout.chunks, whole.split(sizes), strict=True))

    def _pieces(self) -> Iterator[wire.Framed[ps_pb2.PushRequest]]:
        block = tensor_pb2.Block(first=0, size=1)
        for chunk, values in self._parts(self._gradients):
            view = byte_view(values)
            header = ps_pb2.PushRequest(run_id=RUN, step=self._step, block=block, chunk=chunk, tokens=1)
            for start, end in wire.payload_ranges(len(view)):
                piece = tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, offset=start, total=len(view))
                header.slice.CopyFrom(piece)
                yield wire.Framed(header, view[start:end])

    def _take(self, pulled: Any) -> None:
        due = {chunk: Assembly(part, f"chunk {chunk}") for chunk, part in self._parts(self._parameters)}
        for piece in pulled:
            header = piece.header
            assembly = due[header.chunk]
            total = 4 * assembly.tensor.numel()
            wire.check_slice(header.slice, piece.payload, total_bytes_max=total, what=f"chunk {header.chunk}")
            if assembly.add(header.slice, piece.payload):
                del due[header.chunk]
        if due:
            raise RuntimeError(f"{len(due)} chunks never came")


# ---- peers ------------------------------------------------------------------------------------------------------------

_remote: dict[str, Tensor] = {}  # the parameters that rank 1 holds


def apply_and_return(gradients: Tensor) -> Tensor:
    """On rank 1 of torch.distributed.rpc."""
    return _remote["parameters"].add_(gradients, alpha=-LEARNING_RATE)


def serve_rpc(rank: int, num_bytes: int) -> None:
    from torch.distributed import rpc as torch_rpc

    _remote["parameters"] = torch.zeros(num_bytes // 4)
    gradients = torch.full((num_bytes // 4,), 1e-3)
    options = torch_rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}")
    torch_rpc.init_rpc(f"rank{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        parameters = torch.zeros(num_bytes // 4)

        def run(_: object) -> float:
            began = time.perf_counter()
            parameters.copy_(torch_rpc.rpc_sync("rank1", apply_and_return, args=(gradients,)))
            return time.perf_counter() - began

        serve({}, run)
    torch_rpc.shutdown()


def serve_gloo(rank: int, num_bytes: int) -> None:
    """Data parallel: both ranks add up the gradients and step their own copy; the same bytes are sent each way."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", rank=rank, world_size=2)
    gradients, parameters = torch.full((num_bytes // 4,), 1e-3), torch.zeros(num_bytes // 4)

    def run(_: object) -> float:
        go = torch.ones(1)
        dist.broadcast(go, 0)
        if not go.item():
            return 0.0
        began = time.perf_counter()
        dist.all_reduce(gradients)
        parameters.add_(gradients, alpha=-LEARNING_RATE)
        seconds = time.perf_counter() - began
        gradients.fill_(1e-3)
        return seconds

    if rank == 0:
        serve({}, run)
        dist.broadcast(torch.zeros(1), 0)
    else:
        while run(None):
            pass
    dist.destroy_process_group()


def main(role: str, num_bytes: int, port: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    roles: dict[str, Callable[[], None]] = {
        "shard": lambda: serve_shard(num_bytes),
        "rpc0": lambda: serve_rpc(0, num_bytes),
        "rpc1": lambda: serve_rpc(1, num_bytes),
        "gloo0": lambda: serve_gloo(0, num_bytes),
        "gloo1": lambda: serve_gloo(1, num_bytes),
    }
    roles[role]()


if __name__ == "__main__":
    # Under its importable name: torch.distributed.rpc looks `apply_and_return` up by it on the other side.
    from benchmarks import transport_rounds

    transport_rounds.main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
