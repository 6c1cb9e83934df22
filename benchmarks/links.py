"""Tokens a second over slow links: our modes beside DistributedDataParallel over gloo, two machines, one replica on each.

Machines are network namespaces whose links let through so many bits a second (`benchmarks.wires`; needs root). Each has a worker
and a shard. The work is small, so that dense communication takes at least as long as computing; how much is printed. DDP keeps
one copy of everything per machine; so that both do the same, ours keep one copy of every chunk, but where two are named.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import harness
from benchmarks.children import Child, free_port
from benchmarks.compression import CHANGES as SMALL
from benchmarks.compression import CODES, CONFIG, with_code
from benchmarks.fleet import Fleet, step_seconds
from benchmarks.harness import Report, arguments
from benchmarks.wires import Wires, placed
from shardlane.config import Config, load, to_toml
from shardlane.partition import Layout
from shardlane.prepare import ensure_prepared

DDP = "DDP, gloo"
ONE_COPY: dict[str, object] = {"cluster.replication": 1}
FEWER: dict[str, object] = {"communication.push": "int8", "communication.pull": "bf16"}
LATE: dict[str, object] = {"train.consistency": "ssp", "train.staleness": 1}
MODES: Mapping[str, Mapping[str, object]] = {
    "BSP": ONE_COPY,
    "BSP, two copies": {},
    "one-step delay": {**ONE_COPY, **LATE},
    "int8, bf16": {**ONE_COPY, **FEWER},
    "one-step delay, int8, bf16": {**ONE_COPY, **FEWER, **LATE},
    "top-k 1 % int8, bf16": {**ONE_COPY, **FEWER, "communication.push": "top_k_int8"},
    "DiLoCo, H = 50, int8": {**ONE_COPY, **CODES["DiLoCo, H = 50, int8"]},
}
CHANGES: dict[str, object] = {
    **SMALL,
    "train.global_batch_size": 2,
    "train.micro_batch_size": 1,
    "train.max_steps": 1_000_000,
    "validation.num_micro_batches": 0,
    "cluster.shards": 2,
}
MACHINE = {"coordinator": 0, "shard-0": 0, "worker-0": 0, "shard-1": 1, "worker-1": 1}


def ours(config: Config, wires: Wires, run_dir: Path, *, window_seconds: float) -> float:
    """Tokens a second."""
    with Fleet(config, run_dir, lambda name, command: placed(command, wires, MACHINE[name])) as fleet:
        workers = fleet.workers()
        time.sleep(window_seconds / 4)
        return config.train.global_batch_size * config.train.seq_len / step_seconds(workers, window_seconds)


def theirs(config: Config, wires: Wires | None, folder: Path, *, window_seconds: float) -> float:
    """Tokens a second of DDP; without wires over loopback."""
    file = folder / "peer.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    port, address = str(free_port()), wires.address(0) if wires else "127.0.0.1"
    with ExitStack() as stack:
        ranks: dict[int, Child] = {}
        for rank in (1, 0):  # rank 0 ends first, and tells the other
            environment = {"GLOO_SOCKET_IFNAME": wires.interface(rank) if wires else "lo"}
            prefix = wires.prefix(rank) if wires else []
            where = [str(rank), str(file), config.data.path, address, port]
            ranks[rank] = stack.enter_context(Child("benchmarks.links_peer", *where, environment=environment, prefix=prefix))
        ranks[0].read()
        num_steps = max(2, int(window_seconds / (ranks[0].ask(steps=3) / 3)))
        return num_steps * config.train.global_batch_size * config.train.seq_len / float(ranks[0].ask(steps=num_steps))


def main(argv: list[str]) -> int:
    parser = arguments("links", __doc__, rounds=3)
    parser.add_argument("--megabits", type=float, nargs="+", default=[1000.0, 100.0], help="of each link (default: %(default)s)")
    parser.add_argument("--window-seconds", type=float, default=15.0, help="of each mode (default: %(default)s)")
    options = parser.parse_args(argv)
    config = load(CONFIG).with_changes(CHANGES)
    report = Report("links", "tokens/s")
    window = options.window_seconds
    with tempfile.TemporaryDirectory(prefix="shardlane-links-") as temporary:
        folder = Path(temporary)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        config = config.with_changes({"data.path": str(data)})
        num_bytes = 4 * Layout.of(config).num_parameters
        seconds = config.train.global_batch_size * config.train.seq_len / theirs(config, None, folder, window_seconds=window)
        for megabits in options.megabits:
            dense = num_bytes * 8 / megabits / 1e6
            report.notes.append(
                f"{megabits:g} Mbit/s: to send all {num_bytes / 1e6:.1f} MB of gradients once takes {dense:.2f} s,"
                f" {dense / seconds:.1f} times a step of DDP over loopback ({seconds:.2f} s)"
            )
            with Wires(megabits) as wires:
                measure(report, config, wires, folder, rounds=options.rounds, window_seconds=window, megabits=megabits)
    return harness.finish(report, options)


def measure(
    report: Report, config: Config, wires: Wires, folder: Path, *, rounds: int, window_seconds: float, megabits: float
) -> None:
    """All modes and DDP by turns."""
    for index in range(rounds):
        found = {DDP: theirs(config, wires, folder, window_seconds=window_seconds)}
        for number, (name, changes) in enumerate(MODES.items()):
            run_dir = folder / f"run-{megabits:g}-{index}-{number}"
            found[name] = ours(with_code(config, changes), wires, run_dir, window_seconds=window_seconds)
        for name, rate in found.items():
            report.samples.setdefault(f"{megabits:g} Mbit/s: {name}", []).append(rate)
            print(f"{megabits:g} Mbit/s: {name}: {rate:.0f} tokens/s", file=sys.stderr)
    for name in MODES:
        report.compare(f"{megabits:g} Mbit/s: {name}", f"{megabits:g} Mbit/s: {DDP}", name=f"{megabits:g} Mbit/s: {name} / DDP")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
