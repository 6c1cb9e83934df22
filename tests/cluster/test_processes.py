"""Real processes by `shardlane local`, real sockets and files: a covering set of shapes, schedules and ties."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.threads import comparable, rows_of

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
RUN_SECONDS_MAX = 110
COVERING = [  # every shape, both schedules, tied and not
    ((1, 1, 1), "gpipe", True),
    ((2, 1, 1), "1f1b", True),
    ((2, 2, 2), "gpipe", False),
    ((3, 1, 2), "1f1b", False),
    ((4, 1, 3), "gpipe", True),
    ((1, 4, 2), "1f1b", False),
]


class Runs:
    """Runs of the command line in folders of their own, over one prepared data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._truth: dict[bool, tuple[str, Path]] = {}
        self.shardlane("prepare", str(TINY), "--run-dir", str(folder / "base"))

    def shardlane(self, *arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "shardlane.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def settings(self, tied: bool = False) -> list[str]:
        fixed = {"data.path": self.folder / "base" / "data", "train.max_steps": 4, "validation.every_steps": 2}
        fixed["model.tie_word_embeddings"] = str(tied).lower()
        return [part for key, value in fixed.items() for part in (f"--{key}", str(value))]

    def truth(self, tied: bool) -> tuple[str, Path]:
        """The reference's digest line and folder."""
        if tied not in self._truth:
            run_dir = self.folder / f"reference-{tied}"
            self.shardlane("reference", str(TINY), "--run-dir", str(run_dir), *self.settings(tied))
            self._truth[tied] = self.shardlane("digest", str(run_dir)), run_dir
        return self._truth[tied]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("processes"))


def shaped(stages: int, replicas: int, shards: int) -> list[str]:
    return ["--stages", str(stages), "--replicas", str(replicas), "--shards", str(shards)]


@pytest.mark.parametrize(("shape", "schedule", "tied"), COVERING, ids=str)
def test_processes_end_with_the_references_digest_and_losses(
    runs: Runs, tmp_path: Path, shape: tuple[int, int, int], schedule: str, tied: bool
) -> None:
    digest, reference = runs.truth(tied)
    settings = [*runs.settings(tied), "--pipeline.schedule", schedule]
    runs.shardlane("local", str(TINY), "--run-dir", str(tmp_path), *shaped(*shape), *settings)
    assert runs.shardlane("digest", str(tmp_path)) == digest
    assert comparable(rows_of(tmp_path)) == comparable(rows_of(reference))


def test_ctrl_c_stops_with_a_checkpoint_and_another_shape_goes_on(runs: Runs, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardlane.cli", "local", str(TINY), "--run-dir", str(tmp_path)]
    endless = ["--train.max_steps", "100000"]
    settings = [*runs.settings(), *endless]
    process = subprocess.Popen(
        [*command, *shaped(2, 1, 1), *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows_of(tmp_path)) >= 2, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=RUN_SECONDS_MAX)
        assert process.returncode == 0, output
    finally:
        process.kill()
    stopped = int(runs.shardlane("digest", str(tmp_path)).split()[1])
    assert stopped >= 2
    until = str(stopped + 2)
    again = [*settings, "--train.stop_at_step", until]
    runs.shardlane("local", str(TINY), "--run-dir", str(tmp_path), *shaped(1, 2, 2), *again)
    unbroken = tmp_path / "unbroken"
    runs.shardlane("reference", str(TINY), "--run-dir", str(unbroken), *again)
    assert runs.shardlane("digest", str(tmp_path)) == runs.shardlane("digest", str(unbroken))


def test_no_child_outlives_a_killed_supervisor(runs: Runs, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardlane.cli", "local", str(TINY), "--run-dir", str(tmp_path), *shaped(2, 1, 1)]
    process = subprocess.Popen(
        [*command, *runs.settings(), "--train.max_steps", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows_of(tmp_path)) >= 1, process)
        children = pids_with_parent_variable(process.pid)
        assert len(children) == 4
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + 5
    while time.monotonic() < end and any(is_running(pid) for pid in children):
        time.sleep(0.05)
    assert not [pid for pid in children if is_running(pid)]


def wait_for(condition: object, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + RUN_SECONDS_MAX - 30
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def pids_with_parent_variable(parent: int) -> list[int]:
    """The processes that were started to watch `parent`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SHARDLANE_PARENT_PID={parent}".encode() in variables:
                found.append(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_status_answers_while_a_run_goes_on(runs: Runs, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardlane.cli", "local", str(TINY), "--run-dir", str(tmp_path), *shaped(2, 1, 1)]
    process = subprocess.Popen(
        [*command, *runs.settings(), "--train.max_steps", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows_of(tmp_path)) >= 1, process)
        assert "training" in runs.shardlane("status", str(tmp_path))
        runs.shardlane("pause", str(tmp_path))
        runs.shardlane("resume", str(tmp_path))
        runs.shardlane("checkpoint", str(tmp_path))
        wait_for(lambda: list((tmp_path / "checkpoints").glob("*/manifest.json")), process)
        runs.shardlane("stop", str(tmp_path))
        assert process.wait(RUN_SECONDS_MAX) == 0
    finally:
        process.kill()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(len([row for row in rows if "loss" in row])))
