"""What the second copy of every chunk costs: step time with `replication` 2 over that with 1, two shards in both legs.

The 20 M-parameter model on two stages, everything else on, every process counted; legs alternate.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Report, Target, alternate, arguments
from benchmarks.pipeline import COMMON, CONFIG
from benchmarks.pipeline_cluster import run_cluster
from shardlane.config import Config, load, to_toml
from shardlane.prepare import ensure_prepared

ONE, TWO = "replication 1", "replication 2"
TARGET = Target(median_max=1.05, high_max=1.08)


def subjects(config: Config, folder: Path, *, warm_up: int, steps: int) -> dict[str, Callable[[], float]]:
    """Seconds a step of each leg."""
    file, num_runs = folder / "config.toml", [0]
    file.write_text(to_toml(config), encoding="utf-8")

    def leg(copies: int) -> float:
        num_runs[0] += 1
        overrides = ("--cluster.replication", str(copies))
        measured = run_cluster(
            file, folder / f"run-{num_runs[0]}", overrides, warm_up=warm_up, steps=steps, tokens_a_step=1, device="cpu"
        )
        return 1.0 / measured.tokens_per_second

    return {ONE: lambda: leg(1), TWO: lambda: leg(2)}


def main(argv: list[str]) -> int:
    parser = arguments("replication", __doc__, rounds=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a leg that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another model (default: configs/20m.toml)")
    options = parser.parse_args(argv)
    config = load(options.config).with_changes({**COMMON, "cluster.shards": 2})
    report = Report("replication", "s a step")
    with tempfile.TemporaryDirectory(prefix="shardlane-replication-") as temporary:
        folder = Path(temporary)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        runs = subjects(config.with_changes({"data.path": str(data)}), folder, warm_up=options.warm_up, steps=options.steps)
        report.samples = alternate(runs, rounds=options.rounds, warm_up=0)
    report.compare(TWO, ONE, TARGET, name="step time: replication 2 / replication 1")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
