"""Training while the coordinator is dead: step time without over that with it, in one run, by turns; then longer outages.

The coordinator is killed (SIGKILL) for each window without it and started again from its store. At the end every step must have
been told to it, with no plan of another timeline.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.fleet import Fleet, step_seconds
from benchmarks.harness import Report, Target, arguments
from shardlane.config import Config, load
from shardlane.prepare import ensure_prepared

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"
CHANGES = {
    "cluster.stages": 2,
    "cluster.replicas": 1,
    "cluster.shards": 2,
    "train.max_steps": 1_000_000,
    "validation.num_micro_batches": 0,
    "log.level": "warning",
}
WITH, WITHOUT = "with the coordinator", "without it"
TARGET = Target(median=0.97, median_max=1.05)
SETTLE_SECONDS = 3.0  # after a start: it is read in, and hears what it has missed


def measure(config: Config, run_dir: Path, report: Report, *, rounds: int, window_seconds: float, outages: list[float]) -> None:
    report.samples = {WITH: [], WITHOUT: []}
    with Fleet(config, run_dir) as fleet:
        workers = fleet.workers()
        time.sleep(SETTLE_SECONDS)
        for index in range(rounds):
            report.samples[WITH].append(step_seconds(workers, window_seconds))
            fleet.kill_coordinator()
            report.samples[WITHOUT].append(step_seconds(workers, window_seconds))
            fleet.restart_coordinator()
            time.sleep(SETTLE_SECONDS)
            print(f"round {index + 1} of {rounds}", file=sys.stderr)
        long_ones = []
        for seconds in outages:
            print(f"an outage of {seconds:g} s", file=sys.stderr)
            fleet.kill_coordinator()
            long_ones.append({"seconds": seconds, "step_seconds": step_seconds(workers, seconds)})
            fleet.restart_coordinator()
            time.sleep(SETTLE_SECONDS)
        status = fleet.wait(lambda status: status.version > 0)
    report.extra["outages"] = long_ones
    report.extra["steps"] = status.version
    rows = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if status.plan.timeline.id or rows != list(range(len(rows))) or len(rows) < status.version:
        raise RuntimeError(f"steps were lost: timeline {status.plan.timeline.id}, {len(rows)} rows at version {status.version}")
    report.notes.append(f"{status.version} steps, each told once; no roll-back")
    report.notes += [f"outage of {each['seconds']:g} s: {each['step_seconds']:.4f} s a step" for each in long_ones]


def main(argv: list[str]) -> int:
    parser = arguments("outage", __doc__, rounds=8)
    parser.add_argument("--window-seconds", type=float, default=20.0, help="of each half of a round (default: %(default)s)")
    parser.add_argument(
        "--outages", type=float, nargs="*", default=[60.0, 300.0], metavar="SECONDS", help="longer ones (default: 60 300)"
    )
    options = parser.parse_args(argv)
    config = load(CONFIG).with_changes(CHANGES)
    report = Report("outage", "s a step")
    with tempfile.TemporaryDirectory(prefix="shardlane-outage-") as temporary:
        run_dir = Path(temporary) / "run"
        data = ensure_prepared(config, run_dir, lambda line: print(line, file=sys.stderr)).path
        config = config.with_changes({"data.path": str(data)})
        chosen = {"rounds": options.rounds, "window_seconds": options.window_seconds}
        measure(config, run_dir, report, **chosen, outages=options.outages)
    report.compare(WITHOUT, WITH, TARGET, name="step time: without / with the coordinator")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
