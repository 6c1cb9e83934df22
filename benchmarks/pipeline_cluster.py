"""Our side of the pipeline benchmark: `shardlane local` with every process that belongs to it, measured from outside.

Time is the workers' own: `shardlane_worker_step_seconds`, from one version to the next, optimizer and traffic included. The
rows of `metrics.jsonl` come with heartbeats, up to a second late, which a few steps cannot average away.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from shardlane.cli.client import CoordinatorClient
from shardlane.cli.rows import RowsTail
from shardlane.cli.run_folder import RunFolder
from shardlane.errors import UserError
from shardlane.pb import coordinator_pb2

START_SECONDS = 120.0
STEP_SECONDS_MAX = 60.0
STEPS = "shardlane_worker_step_seconds"
PHASES = "shardlane_worker_phase_seconds_total"
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker's counters at a moment between two steps, or within one: only whole steps count in `num_steps` and `seconds`."""

    num_steps: float
    seconds: float
    phases: dict[str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """`bubble`: waiting for a neighbour over waiting and computing, of all stages together."""

    tokens_per_second: float
    bubble: float
    phases: list[dict[str, float]]  # seconds a worker spent by phase


def samples_of(address: str) -> list[Sample]:
    """All that a member's `/metrics` says."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def counter(address: str, name: str) -> float:
    """One sample's value, over all its labels."""
    return sum(sample.value for sample in samples_of(address) if sample.name == name)


def seen(address: str) -> Seen:
    """Reads a worker's `/metrics`."""
    values: dict[str, float] = {}
    phases: dict[str, float] = {}
    for sample in samples_of(address):
        if sample.name == PHASES:
            phases[sample.labels["phase"]] = sample.value
        elif sample.name in (f"{STEPS}_count", f"{STEPS}_sum"):
            values[sample.name] = sample.value
    return Seen(values[f"{STEPS}_count"], values[f"{STEPS}_sum"], phases)


def between(before: Sequence[Seen], after: Sequence[Seen], tokens_a_step: int) -> Measured:
    """What happened from one look at all workers to a later one. Raises `ValueError` without a whole step between."""
    num_steps = sum(late.num_steps - early.num_steps for early, late in zip(before, after, strict=True))
    if num_steps < 1:
        raise ValueError("no whole step between the two looks")
    seconds = sum(late.seconds - early.seconds for early, late in zip(before, after, strict=True))
    phases = [
        {name: late.phases[name] - early.phases.get(name, 0.0) for name in late.phases}
        for early, late in zip(before, after, strict=True)
    ]
    bubble, compute = (sum(each.get(name, 0.0) for each in phases) for name in ("bubble", "compute"))
    return Measured(tokens_a_step * num_steps / seconds, bubble / (bubble + compute), phases)


def run_cluster(
    config: Path, run_dir: Path, overrides: Sequence[str], *, warm_up: int, steps: int, tokens_a_step: int, device: str
) -> Measured:
    """Trains from scratch in `run_dir`, measures `steps` steps after `warm_up` ones, and stops everything."""
    environment = {**os.environ} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, "-m", "shardlane.cli", "local", str(config), "--run-dir", str(run_dir), *overrides]
    log = run_dir.with_name(f"{run_dir.name}.log")
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        with CoordinatorClient(_coordinator(process, run_dir, log)) as client:
            workers = _workers(process, client, log)
        before = _look(process, workers, run_dir, warm_up, log)
        after = _look(process, workers, run_dir, warm_up + steps, log)
        return between(before, after, tokens_a_step)
    finally:
        _end(process)


def _coordinator(process: subprocess.Popen[bytes], run_dir: Path, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    folder = RunFolder(run_dir)
    while (address := folder.coordinator_address()) is None:
        _check(process, deadline, log)
        time.sleep(_POLL_SECONDS)
    return address


def _workers(process: subprocess.Popen[bytes], client: CoordinatorClient, log: Path) -> list[str]:
    """`/metrics` of each worker, once training has begun."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        _check(process, deadline, log)
        try:
            status = client.status()
        except UserError:
            continue
        finally:
            time.sleep(_POLL_SECONDS)
        found = [each.metrics_address for each in status.members if each.member.role == coordinator_pb2.ROLE_WORKER]
        if found and all(found) and status.state == coordinator_pb2.RUN_STATE_TRAINING:
            return found


def _look(process: subprocess.Popen[bytes], workers: Sequence[str], run_dir: Path, num_steps: int, log: Path) -> list[Seen]:
    """Looks at all workers once the run's rows tell of `num_steps`: until then nobody is asked anything."""
    deadline = time.monotonic() + STEP_SECONDS_MAX * (num_steps + 1)
    rows = RowsTail(RunFolder(run_dir).metrics_file, skip_present=False)
    found = 0
    while (found := found + len(rows.read())) < num_steps:
        _check(process, deadline, log)
        time.sleep(_POLL_SECONDS)
    return [seen(worker) for worker in workers]


def _check(process: subprocess.Popen[bytes], deadline: float, log: Path) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        state = "is too slow" if process.returncode is None else f"ended with status {process.returncode}"
        raise RuntimeError(f"shardlane local {state}; {log} ends with: {log.read_text(encoding='utf-8')[-500:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C twice: at once, without a checkpoint. `local` takes its children along."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
