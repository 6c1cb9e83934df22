"""A machine that becomes four times slower for good: how much of the speed that is left training gets once lanes have moved.

Two replicas of one stage, eight lanes. One worker's process gets a quarter of its time (SIGSTOP and SIGCONT by turns), so 1.25 of
two machines are left: 0.625 of the speed before.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.fleet import Fleet, step_seconds
from benchmarks.harness import Report, Spread, Target, arguments
from shardlane.cli.supervisor import Child
from shardlane.config import Config, load
from shardlane.prepare import ensure_prepared

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"
CHANGES = {
    "cluster.stages": 1,
    "cluster.replicas": 2,
    "cluster.shards": 1,
    "train.lanes": 8,
    "train.global_batch_size": 64,
    "train.micro_batch_size": 4,
    "train.max_steps": 1_000_000,
    "validation.num_micro_batches": 0,
}
SLOWDOWN = 4
LEFT = (1 + 1 / SLOWDOWN) / 2
BEFORE, LAGGING, MOVED = "both at full speed", "one slow, lanes as they were", "one slow, lanes moved"
RUN_SECONDS, STOP_SECONDS = 0.02, 0.02 * (SLOWDOWN - 1)


class Brake:
    """Gives a process one part in `SLOWDOWN` of its time, until the end of the block."""

    def __init__(self, child: Child) -> None:
        self._child, self._released = child, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        self._child.send(signal.SIGCONT)

    def _run(self) -> None:
        while not self._released.wait(RUN_SECONDS):
            self._child.send(signal.SIGSTOP)
            time.sleep(STOP_SECONDS)
            self._child.send(signal.SIGCONT)


def measure(config: Config, run_dir: Path, *, window_seconds: float) -> dict[str, float]:
    """Steps a second in each state."""
    with Fleet(config, run_dir) as fleet:
        workers = fleet.workers()
        time.sleep(window_seconds / 2)
        before = step_seconds(workers, window_seconds)
        version = fleet.wait(lambda status: True).plan.number.epoch
        with Brake(fleet.members["worker-1"]):
            lagging = step_seconds(workers, 3.0)
            fleet.wait(lambda status: status.plan.number.epoch > version and "faster" in status.plan.reason)
            time.sleep(window_seconds / 2)
            moved = step_seconds(workers, window_seconds)
    return {BEFORE: 1 / before, LAGGING: 1 / lagging, MOVED: 1 / moved}


def main(argv: list[str]) -> int:
    parser = arguments("straggler", __doc__, rounds=3)
    parser.add_argument("--window-seconds", type=float, default=15.0, help="of each state (default: %(default)s)")
    options = parser.parse_args(argv)
    config = load(CONFIG).with_changes(CHANGES)
    report = Report("straggler", "steps/s")
    report.samples = {BEFORE: [], LAGGING: [], MOVED: []}
    with tempfile.TemporaryDirectory(prefix="shardlane-straggler-") as temporary:
        folder = Path(temporary)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        config = config.with_changes({"data.path": str(data)})
        for index in range(options.rounds):
            for name, rate in measure(config, folder / f"run-{index}", window_seconds=options.window_seconds).items():
                report.samples[name].append(rate)
    pairs = zip(report.samples[MOVED], report.samples[BEFORE], strict=True)
    name = "lanes moved / what the remaining speed allows"
    report.ratios[name] = Spread.of([moved / (LEFT * before) for moved, before in pairs])
    report.targets[name] = Target(0.85)
    report.compare(LAGGING, BEFORE, name=f"{LAGGING} / before")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
