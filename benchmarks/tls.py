"""The cost of mutual TLS: step time of one and the same small cluster with it over that without, by turns; then megabytes a
second of pushes and pulls between two processes, with and without.

Both clusters stand all the time; the one whose turn it is not is held between two steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.children import Child
from benchmarks.fleet import Fleet, step_seconds
from benchmarks.harness import Report, Target, alternate, arguments
from shardlane import rpc
from shardlane.certificates import write_certificates
from shardlane.cli.cluster import Command
from shardlane.config import Config, load
from shardlane.prepare import ensure_prepared
from shardlane.process import prepare_process
from shardlane.tls import Tls

CONFIG = Path(__file__).parents[1] / "configs" / "20m.toml"
CHANGES = {
    "cluster.stages": 2,
    "cluster.replicas": 1,
    "cluster.shards": 2,
    "train.max_steps": 1_000_000,
    "validation.num_micro_batches": 0,
    "log.level": "warning",
}
PLAIN, TLS = "plain text", "mutual TLS"
TARGET = Target(median_max=1.05)
MIB = 1 << 20


def with_certificates(certs: Path) -> Callable[[str, Command], Command]:
    """A service's command, by its name such as shard-0, with the certificate of its role."""

    def place(name: str, command: Command) -> Command:
        role = name.partition("-")[0]
        files = {"--ssl-ca-certfile": "ca.pem", "--ssl-certfile": f"{role}.pem", "--ssl-keyfile": f"{role}.key"}
        return [*command, *(word for flag, file in files.items() for word in (flag, str(certs / file)))]

    return place


def measure_steps(config: Config, folder: Path, certs: Path, report: Report, *, rounds: int, window_seconds: float) -> None:
    """Seconds a step. A window begins once its cluster has made two steps again: a worker's first has the time in it that it was
    held.
    """
    with ExitStack() as stack:
        fleets = {PLAIN: stack.enter_context(Fleet(config, folder / "plain"))}
        held = {PLAIN: fleets[PLAIN].pause()}
        operator = rpc.Network(Tls.in_folder(certs, "operator"))
        fleets[TLS] = stack.enter_context(Fleet(config, folder / "tls", with_certificates(certs), operator))
        held[TLS] = fleets[TLS].pause()
        workers = {name: fleet.workers() for name, fleet in fleets.items()}

        def leg(name: str) -> float:
            fleet = fleets[name]
            fleet.resume()
            fleet.wait(lambda status: status.version > held[name] + 1)
            seconds = step_seconds(workers[name], window_seconds)
            held[name] = fleet.pause()
            print(f"{name}: {seconds:.4f} s a step", file=sys.stderr)
            return seconds

        report.samples = alternate({name: partial(leg, name) for name in fleets}, rounds=rounds)
    report.compare(TLS, PLAIN, TARGET, name=f"step time: {TLS} / {PLAIN}")


def measure_transport(num_bytes: int, certs: Path, report: Report, *, rounds: int) -> None:
    """Megabytes a second, one way at a time."""
    from benchmarks.transport_paths import Buffer, OurPath

    with ExitStack() as stack:
        buffer = Buffer(num_bytes)
        subjects: dict[str, Callable[[], float]] = {}
        for name, arguments_of in ((PLAIN, ()), (TLS, (str(certs),))):
            server = stack.enter_context(Child("benchmarks.transport_paths", "ours", str(num_bytes), *arguments_of))
            network = rpc.Network(Tls.in_folder(certs, "worker")) if arguments_of else rpc.PLAIN
            path = OurPath(server.read()["port"], buffer, network)
            stack.callback(path.close)
            for way, run in (("push", path.push), ("pull", path.pull)):
                subjects[f"{way}, {name}"] = partial(megabytes_a_second, num_bytes, run)
        samples = alternate(subjects, rounds=rounds, warm_up=2)
    rates = {name: harness.Spread.of(found) for name, found in samples.items()}
    report.extra["transport"] = {"unit": "MB/s", "samples": samples, "rates": {k: v.as_json() for k, v in rates.items()}}
    report.notes += [f"{name}: {rate.median:.0f} MB/s ({rate.low:.0f} to {rate.high:.0f})" for name, rate in rates.items()]


def megabytes_a_second(num_bytes: int, run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return num_bytes / (time.perf_counter() - began) / 1e6


def main(argv: list[str]) -> int:
    parser = arguments("tls", __doc__, rounds=9)
    parser.add_argument("--window-seconds", type=float, default=20.0, help="of each half of a round (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another model (default: configs/20m.toml)")
    parser.add_argument("--mib", type=int, default=256, help="bytes each way, a multiple of 4 (default: %(default)s)")
    options = parser.parse_args(argv)
    prepare_process(1)  # before torch: threads and malloc as in our services
    report = Report("tls", "s a step")
    with tempfile.TemporaryDirectory(prefix="shardlane-tls-") as temporary:
        folder = Path(temporary)
        certs = folder / "certs"
        write_certificates(certs, days=2)
        config = load(options.config).with_changes(CHANGES)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        config = config.with_changes({"data.path": str(data)})
        measure_steps(config, folder, certs, report, rounds=options.rounds, window_seconds=options.window_seconds)
        measure_transport(options.mib * MIB, certs, report, rounds=options.rounds)
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
