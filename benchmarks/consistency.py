"""BSP beside SSP and one-step delay: validation loss at equal tokens, and speed while a slowness goes round among the replicas.

Losses are the reference's, which computes what a cluster computes, bit for bit: every mode with every seed, the same tokens.

Speed: two replicas, of which one at a time gets a quarter of its time, by turns. Under BSP every step takes as long as the slow
one needs. Under SSP the other one goes ahead meanwhile, and has to wait less. A model of two clocks says how much that is worth.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from threading import Event, Thread

from benchmarks import harness
from benchmarks.compression import CHANGES, CONFIG, losses
from benchmarks.fleet import Fleet, step_seconds
from benchmarks.harness import Report, Spread, Target, arguments
from benchmarks.pipeline_cluster import counter
from benchmarks.straggler import SLOWDOWN, Brake
from shardlane.cli.supervisor import Child
from shardlane.config import Config, load
from shardlane.partition import Layout
from shardlane.prepare import ensure_prepared

BSP, DELAY, SSP, ASP = "BSP", "one-step delay", "SSP, s = 2", "ASP"
LATE: dict[str, dict[str, object]] = {
    DELAY: {"train.consistency": "ssp", "train.staleness": 1},
    SSP: {"train.consistency": "ssp", "train.staleness": 2},
}
FREE: dict[str, object] = {"train.consistency": "asp"}
WARMUP = 0.4  # of the steps that the loss is measured after
WARMED = ", looking ahead after a warm-up"  # the mode whose loss has to be BSP's
TOKENS = "shardlane_worker_tokens_total"
SMALL: dict[str, object] = {"train.seq_len": 64}  # several steps within LAGGING_SECONDS
WORSE = 0.01  # or two deviations between seeds
LAGGING_SECONDS = 3.0  # after a replica became slow, and before the coordinator has moved its lanes
TURN_STEPS = 4.0  # how long one replica is slow at a time, in steps of an undisturbed replica


def predicted_rate(staleness: int, *, slowdown: float, turn_steps: float, num_turns: int = 400, ticks_a_step: int = 50) -> float:
    """Steps in the time of an undisturbed step, of two replicas of which one at a time is `slowdown` times slower, by turns.

    Each makes a step after the other; it may begin step c once both have made c - staleness steps. Nothing else takes time.
    Steps vary by a tenth, or the result would depend on how turns and steps happen to fit together.
    """
    chance = random.Random(0)
    done, left = [0, 0], [1.0, 1.0]
    for tick in range(int(num_turns * turn_steps * ticks_a_step)):
        slow = int(tick / (turn_steps * ticks_a_step)) % 2
        may_begin = min(done) + staleness
        for each in range(2):
            if done[each] <= may_begin:
                left[each] -= 1.0 / ticks_a_step / (slowdown if each == slow else 1.0)
            if left[each] <= 0.0:
                done[each], left[each] = done[each] + 1, left[each] + chance.uniform(0.9, 1.1)
    return min(done) / (num_turns * turn_steps)


@contextmanager
def brake_by_turns(children: Sequence[Child], seconds: float) -> Iterator[None]:
    """One of the processes is slow at any moment, each for `seconds` at a time."""
    over = Event()

    def run() -> None:
        for child in cycle(children):
            with Brake(child):
                if over.wait(seconds):
                    return

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rates(config: Config, run_dir: Path, *, window_seconds: float, turn_seconds: float | None) -> tuple[float, float]:
    """Steps a second of two replicas undisturbed, and then with the slowness that goes round."""
    with Fleet(config, run_dir) as fleet:
        workers = fleet.workers()
        time.sleep(window_seconds / 4)
        free = step_seconds(workers, window_seconds / 2)
        with brake_by_turns([fleet.members["worker-0"], fleet.members["worker-1"]], turn_seconds or TURN_STEPS * free):
            time.sleep(window_seconds / 4)
            return 1 / free, 1 / step_seconds(workers, window_seconds)


def measure_speed(report: Report, config: Config, folder: Path, *, rounds: int, window_seconds: float) -> None:
    """Both modes take turns of the same length, that of BSP's undisturbed steps."""
    config = config.with_changes({"train.max_steps": 1_000_000, "schedule.warmup_steps": 0})
    gains, fits = dict[str, list[float]](), dict[str, list[float]]()
    for index in range(rounds):
        free, braked = rates(config, folder / f"speed-{index}-bsp", window_seconds=window_seconds, turn_seconds=None)
        report.samples.setdefault(f"{BSP}, slowness by turns", []).append(braked)
        report.samples.setdefault(f"{BSP}, undisturbed", []).append(free)
        for name in LATE:
            changed = config.with_changes(LATE[name])
            run_dir = folder / f"speed-{index}-{changed.train.staleness}"
            _, rate = rates(changed, run_dir, window_seconds=window_seconds, turn_seconds=TURN_STEPS / free)
            report.samples.setdefault(f"{name}, slowness by turns", []).append(rate)
            predicted = gain_predicted(changed.train.staleness)
            gains.setdefault(name, []).append(rate / braked)
            fits.setdefault(name, []).append(rate / braked / predicted)
            print(f"{name}: {rate / braked:.2f} times BSP's speed; predicted {predicted:.2f}", file=sys.stderr)
    for name, found in gains.items():
        predicted = gain_predicted(int(str(LATE[name]["train.staleness"])))
        report.ratios[f"speed: {name} / {BSP} (predicted {predicted:.2f})"] = Spread.of(found)
        fit = f"speed: measured / predicted gain of {name}"
        report.ratios[fit] = Spread.of(fits[name])
        report.targets[fit] = Target(0.8, median_max=1.2)


def tokens_per_second(workers: Sequence[str], seconds: float) -> float:
    before = sum(counter(each, TOKENS) for each in workers)
    time.sleep(seconds)
    return (sum(counter(each, TOKENS) for each in workers) - before) / seconds


def measure_slow_for_good(report: Report, config: Config, folder: Path, *, rounds: int, window_seconds: float) -> None:
    """One of two replicas becomes slow. BSP waits for it, as long as its lanes have not moved; ASP does not."""
    config = config.with_changes({"train.max_steps": 1_000_000, "schedule.warmup_steps": 0, **SMALL})
    predicted = (1 + 1 / SLOWDOWN) / (2 / SLOWDOWN)  # lanes a second, of two replicas with one each
    gains, kept = [], []
    for index in range(rounds):
        rates = dict[str, float]()
        for name, changes in ((BSP, {}), (ASP, FREE)):
            with Fleet(config.with_changes(changes), folder / f"slow-{index}-{name}") as fleet:
                workers = fleet.workers()
                time.sleep(window_seconds / 4)
                free = tokens_per_second(workers, window_seconds / 2)
                with Brake(fleet.members["worker-1"]):
                    rates[name] = tokens_per_second(workers, LAGGING_SECONDS if name == BSP else window_seconds)
            report.samples.setdefault(f"{name}, one replica slow for good, tokens/s", []).append(rates[name])
            if name == ASP:
                kept.append(rates[ASP] / free / ((1 + 1 / SLOWDOWN) / 2))
        gains.append(rates[ASP] / rates[BSP])
    report.ratios[f"speed: {ASP} / {BSP}, one replica slow for good (predicted {predicted:.2f})"] = Spread.of(gains)
    fit = f"speed: measured / predicted gain of {ASP}"
    report.ratios[fit] = Spread.of([each / predicted for each in gains])
    report.targets[fit] = Target(0.8, median_max=1.2)
    report.ratios[f"speed: {ASP} / what the remaining speed allows of its own"] = Spread.of(kept)


def gain_predicted(staleness: int) -> float:
    slow, fast = (predicted_rate(each, slowdown=SLOWDOWN, turn_steps=TURN_STEPS) for each in (0, staleness))
    return fast / slow


def modes_of(num_steps: int) -> dict[str, dict[str, object]]:
    ahead: dict[str, object] = {"train.look_ahead": True}
    warmed = {**ahead, "train.staleness_warmup_steps": int(WARMUP * num_steps)}
    later = {
        f"{name}{how}": {**LATE[name], **more} for how, more in ((", looking ahead", ahead), (WARMED, warmed)) for name in LATE
    }
    return {BSP: {}, **LATE, **later, ASP: FREE}


def judge_losses(report: Report, found: dict[str, list[float]]) -> None:
    mean = statistics.mean(found[BSP])
    deviation = statistics.stdev(found[BSP]) if len(found[BSP]) > 1 else 0.0
    for name in found:
        report.samples[f"{name}, loss"] = found[name]
        worse = f"loss: {name} / {BSP}"
        report.ratios[worse] = Spread.of([statistics.mean(found[name]) / mean])
        if name.endswith(WARMED):
            report.targets[worse] = Target(median_max=1 + max(WORSE, 2 * deviation / mean))
    report.notes.append(f"standard deviation of BSP's loss over seeds: {deviation:.4f} of {mean:.4f}")


def main(argv: list[str]) -> int:
    parser = arguments("consistency", __doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=400, help="steps that the loss is measured after (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="references that train at a time (default: %(default)s)")
    parser.add_argument("--window-seconds", type=float, default=30.0, help="of each speed (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the peak, of every mode (default: %(default)s)")
    parser.add_argument("--only", choices=("speed", "loss"), help="leaves out the other")
    parser.add_argument("--hidden-size", type=int, default=192, help="192 makes 3 M parameters, 384 10 M (default: %(default)s)")
    choices = tuple(modes_of(0))
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="NAME",
        choices=choices,
        help=f"whose loss is measured, beside {BSP}: {', '.join(choices[1:])}",
    )
    options = parser.parse_args(argv)
    size = {"model.hidden_size": options.hidden_size, "model.intermediate_size": options.hidden_size * 8 // 3}
    changes = {"train.max_steps": options.steps, "schedule.warmup_steps": options.steps // 20}
    config = load(CONFIG).with_changes({**CHANGES, **size, **changes, "optimizer.learning_rate": options.learning_rate})
    report = Report("consistency", "validation loss in nats a token; steps/s")
    with tempfile.TemporaryDirectory(prefix="shardlane-consistency-") as temporary:
        folder = Path(temporary)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        config = config.with_changes({"data.path": str(data)})
        if options.only != "loss":
            measure_speed(report, config, folder, rounds=options.rounds, window_seconds=options.window_seconds)
            measure_slow_for_good(report, config, folder, rounds=options.rounds, window_seconds=options.window_seconds)
        if options.only != "speed":
            seeds = [config.train.seed + index for index in range(options.rounds)]
            modes = {name: each for name, each in modes_of(options.steps).items() if name in (BSP, *(options.modes or [name]))}
            judge_losses(report, losses(report, config, modes, seeds, options.processes))
            report.notes.append(f"{Layout.of(config).num_parameters / 1e6:.1f} M parameters")
            report.notes.append(
                f"peak learning rate {options.learning_rate:g}; a warm-up is {int(WARMUP * options.steps)} steps of BSP"
            )
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
