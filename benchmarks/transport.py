"""Tensors over the wire: our path beside generated classes, raw bytes over gRPC and raw TCP, and a step's whole traffic.

Every server is a process of its own, on loopback; rounds alternate; buffers are used again. Then a whole round (push, SGD,
pull) against a real shard beside torch.distributed.rpc (tensorpipe) and gloo's all-reduce.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks import harness
from benchmarks.children import Child, free_port
from benchmarks.harness import Report, Target, alternate, arguments
from shardlane.process import prepare_process

MIB = 1 << 20
NAMES = {"ours": "ours", "generated": "generated classes", "raw": "gRPC, raw bytes", "tcp": "raw TCP"}
RATE_TARGET = Target(1.3)


def gigabytes_a_second(num_bytes: int, run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return num_bytes / (time.perf_counter() - began) / 1e9


def measure_paths(report: Report, num_bytes: int, rounds: int) -> None:
    from benchmarks.transport_paths import KINDS, PATHS, Buffer

    with ExitStack() as stack:
        servers = {kind: stack.enter_context(Child("benchmarks.transport_paths", kind, str(num_bytes))) for kind in KINDS}
        buffer = Buffer(num_bytes)
        paths = {kind: PATHS[kind](server.read()["port"], buffer) for kind, server in servers.items()}
        for path in paths.values():
            stack.callback(path.close)
        pushes = {f"push, {NAMES[kind]}": path.push for kind, path in paths.items()}
        pulls = {f"pull, {NAMES[kind]}": path.pull for kind, path in paths.items()}
        for runs in (pushes, pulls):
            subjects = {name: lambda run=run: gigabytes_a_second(num_bytes, run) for name, run in runs.items()}
            report.samples |= alternate(subjects, rounds=rounds, warm_up=2)
    for way in ("push", "pull"):
        report.compare(f"{way}, ours", f"{way}, generated classes", RATE_TARGET, name=f"{way}: ours / generated classes")
        for kind in ("raw", "tcp"):
            report.compare(f"{way}, ours", f"{way}, {NAMES[kind]}", name=f"{way}: ours / {NAMES[kind]}")


def measure_rounds(report: Report, num_bytes: int, rounds: int) -> None:
    from benchmarks.transport_rounds import ShardRounds

    def child(role: str, port: int = 0) -> Child:
        return stack.enter_context(Child("benchmarks.transport_rounds", role, str(num_bytes), str(port)))

    with ExitStack() as stack:
        shard = child("shard")
        ports = {peer: free_port() for peer in ("rpc", "gloo")}
        # Rank 1 is left first, so that it sees rank 0 end.
        ranks = {peer: [child(f"{peer}{rank}", port) for rank in (1, 0)][1] for peer, port in ports.items()}
        worker = ShardRounds(shard.read()["port"], num_bytes)
        for rank in ranks.values():
            rank.read()
        subjects = {
            "round, ours": lambda: 2 * worker.num_bytes / worker.run() / 1e9,
            "round, torch.distributed.rpc": lambda: 2 * num_bytes / ranks["rpc"].ask() / 1e9,
            "round, gloo all-reduce": lambda: 2 * num_bytes / ranks["gloo"].ask() / 1e9,
        }
        report.samples |= alternate(subjects, rounds=rounds, warm_up=2)
    report.compare("round, ours", "round, torch.distributed.rpc", name="round: ours / torch.distributed.rpc")
    report.compare("round, ours", "round, gloo all-reduce", name="round: ours / gloo all-reduce")


def main(argv: list[str]) -> int:
    parser = arguments("transport", __doc__, rounds=9)
    parser.add_argument("--mib", type=int, default=256, help="bytes each way, a multiple of 4 (default: %(default)s)")
    options = parser.parse_args(argv)
    prepare_process(1)  # before torch: threads and malloc as in our services, for every path that begins here
    report = Report("transport", "GB/s")
    report.notes.append(f"{options.mib} MiB each way, messages of 4 MiB; a round moves them both ways, and steps SGD between")
    measure_paths(report, options.mib * MIB, options.rounds)
    measure_rounds(report, options.mib * MIB, options.rounds)
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
