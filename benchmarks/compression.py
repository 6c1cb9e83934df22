"""What each code for pushed gradients saves in bytes, and what it costs in validation loss.

Bytes are what the workers of a real cluster push with one lane a replica, payloads alone. Losses are the reference's, which
computes what a cluster computes, bit for bit: every code with every seed, the same tokens. With local steps (DiLoCo) a step
is one of theirs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks import harness
from benchmarks.fleet import PAUSE_SECONDS, Fleet
from benchmarks.harness import Report, Spread, Target, arguments
from benchmarks.pipeline_cluster import counter
from shardlane.config import Config, load
from shardlane.prepare import ensure_prepared

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
NUM_LANES = 2
CHANGES = {
    "model.hidden_size": 192,  # about 3 M parameters
    "model.intermediate_size": 512,
    "train.lanes": NUM_LANES,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "train.seq_len": 128,
    "validation.every_steps": 0,
    "validation.num_micro_batches": 32,
    "checkpoint.every_steps": 0,
    "cluster.stages": 1,
    "cluster.replicas": NUM_LANES,
    "cluster.shards": 1,
}
LOCAL_STEPS = 50
DENSE = "fp32"
Modes = Mapping[str, Mapping[str, object]]
CODES: Modes = {
    DENSE: {"communication.touched_rows": False},
    "fp32, touched rows": {},
    "bf16": {"communication.push": "bf16"},
    "fp16": {"communication.push": "fp16"},
    "int8": {"communication.push": "int8"},
    "int8, stochastic": {"communication.push": "int8_stochastic"},
    "top-k 1 %, int8": {"communication.push": "top_k_int8"},
    "DiLoCo, H = 50, int8": {
        "communication.push": "int8",
        "train.local_steps": LOCAL_STEPS,
        "optimizer.name": "nesterov",
        "optimizer.learning_rate": 0.7,
        "optimizer.weight_decay": 0.0,
        "optimizer.max_grad_norm": 0.0,
    },
}
SAVED = {"int8": 3.8, "int8, stochastic": 3.8, "top-k 1 %, int8": 60.0, "DiLoCo, H = 50, int8": 150.0}  # times fewer, at least
WORSE = {"int8": 0.005, "int8, stochastic": 0.005, "bf16": 0.005, "fp16": 0.005}  # or two deviations
WORSE |= {"top-k 1 %, int8": 0.03, "DiLoCo, H = 50, int8": 0.03}
PUSHED = "shardlane_worker_pushed_bytes_total"


def with_code(config: Config, changes: Mapping[str, object]) -> Config:
    """The same tokens: with local steps there are as many of these as steps otherwise."""
    local_steps = int(str(changes.get("train.local_steps", 1)))
    sizes = {
        "train.global_batch_size": config.train.global_batch_size * local_steps,
        "train.max_steps": max(1, config.train.max_steps // local_steps),
    }
    return config.with_changes({**sizes, **changes})


def bytes_a_step(config: Config, run_dir: Path, num_steps: int) -> float:
    """What all workers push in a step, on average over `num_steps` and more, between two pauses."""
    with Fleet(config.with_changes({"train.max_steps": 1_000_000, "schedule.warmup_steps": 0}), run_dir) as fleet:
        workers = fleet.workers()
        looks = []
        for _ in range(2):
            version = fleet.pause(max(PAUSE_SECONDS, config.train.local_steps))
            looks.append((version, sum(counter(each, PUSHED) for each in workers)))
            fleet.resume()
            fleet.wait(lambda status, version=version: status.version >= version + num_steps)  # type: ignore[misc]
    (early, pushed_before), (late, pushed) = looks
    return (pushed - pushed_before) / (late - early) / config.train.local_steps


def trained(config: Config) -> tuple[float, list[float]]:
    """The reference's validation loss, and the training loss of every step on the way; in a process of its own."""
    from shardlane.data import open_token_folder
    from shardlane.reference import Reference

    tokens = open_token_folder(config.data.path, model_vocab_size=config.model.vocab_size, verify=False)
    reference = Reference(config, tokens)
    curve = [float(row["loss"]) for row in reference.run() if "loss" in row]
    return reference.validation_loss(), curve


def losses(report: Report, config: Config, modes: Modes, seeds: Sequence[int], processes: int) -> dict[str, list[float]]:
    """Validation losses of every mode, by seed; the curves of the first seed go into the report."""
    jobs = [(name, with_code(config, {**changes, "train.seed": seed})) for name, changes in modes.items() for seed in seeds]
    found: dict[str, list[float]] = {name: [] for name in modes}
    curves: dict[str, dict[str, list[float]]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for (name, job), (loss, curve) in zip(jobs, pool.map(trained, [each for _, each in jobs]), strict=True):
            found[name].append(loss)
            if name not in curves:
                train = job.train
                tokens_a_row = train.lane_tokens * (1 if train.goes_by_turns else train.lanes)
                curves[name] = {"tokens": [tokens_a_row * (t + 1) for t in range(len(curve))], "loss": curve}
            print(f"{name}: validation loss {loss:.4f}", file=sys.stderr)
    report.extra["curves"] = curves
    return found


def judge_losses(report: Report) -> None:
    found = report.samples
    deviation = statistics.stdev(found[DENSE]) if len(found[DENSE]) > 1 else 0.0
    mean = statistics.mean(found[DENSE])
    for name in CODES:
        worse = f"loss: {name} / {DENSE}"
        report.ratios[worse] = Spread.of([statistics.mean(found[name]) / mean])
        if name in WORSE:
            report.targets[worse] = Target(median_max=1 + max(WORSE[name], 2 * deviation / mean))
    report.notes.append(f"standard deviation of the loss over seeds: {deviation:.4f} of {mean:.4f}")


def judge_bytes(report: Report, pushed: dict[str, float]) -> None:
    for name in CODES:
        saved = f"bytes: {DENSE} / {name}"
        report.ratios[saved] = Spread.of([pushed[DENSE] / pushed[name]])
        if name in SAVED:
            report.targets[saved] = Target(SAVED[name])
    report.notes.append(
        f"one lane a replica; with n lanes each, a code that rounds saves 1/n as much beside one {DENSE} sum of them"
    )
    report.extra["bytes_a_step"] = pushed


def main(argv: list[str]) -> int:
    parser = arguments("compression", __doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=400, help="steps that the loss is measured after (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="references that train at a time (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the peak, also of local steps (default: %(default)s)")
    parser.add_argument("--only", choices=("bytes", "loss"), help="leaves out the other")
    options = parser.parse_args(argv)
    rates = {"optimizer.learning_rate": options.learning_rate, "inner.learning_rate": options.learning_rate}
    schedule = {"train.max_steps": options.steps, "schedule.warmup_steps": options.steps // 20}
    config = load(CONFIG).with_changes({**CHANGES, **schedule, **rates})
    report = Report("compression", "validation loss, nats a token")
    with tempfile.TemporaryDirectory(prefix="shardlane-compression-") as temporary:
        folder = Path(temporary)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        config = config.with_changes({"data.path": str(data)})
        seeds = [config.train.seed + index for index in range(options.rounds)]
        if options.only != "bytes":
            report.samples = losses(report, config, CODES, seeds, options.processes)
            judge_losses(report)
        pushed = {}
        for index, (name, changes) in enumerate(CODES.items() if options.only != "loss" else ()):
            coded = with_code(config, changes)
            pushed[name] = bytes_a_step(coded, folder / f"run-{index}", num_steps=1 + 10 // coded.train.local_steps)
            print(f"{name}: {pushed[name] / 1e6:.3f} MB a step", file=sys.stderr)
    if pushed:
        judge_bytes(report, pushed)
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
