"""Who is told what when a child fails, and that nobody is left behind. The children are fakes; the signals are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardlane.cli.cluster import MOST_RESTARTS
from shardlane.cli.supervisor import Supervisor, child_environment
from shardlane.errors import UserError

FAKES = Path(__file__).with_name("fakes.py")
REPOSITORY = FAKES.parents[2]

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `Cluster` in a process of its own, with a worker of some kind."""
    started: list[subprocess.Popen[str]] = []

    def start_cluster(worker: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(FAKES), "cluster", str(tmp_path), worker]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start_cluster
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(run_dir: Path, *roles: str) -> list[int]:
    """Of the fakes, once they are all up."""
    files = [run_dir / f"{role}.pid" for role in roles]
    assert wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_a_child_that_fails_is_quoted_and_the_others_are_stopped(start: Start, tmp_path: Path) -> None:
    process = start("broken")
    others = pids(tmp_path, "coordinator", "steady")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    *_, last_but_one, last = errors.splitlines()
    assert last_but_one == "    the GPU has fallen off the bus"
    assert last == f"shardlane: worker-0 ended with status 3; see {tmp_path}/logs/worker-0.log"
    assert not any(map(is_running, others))
    assert not (tmp_path / "coordinator.json").exists()


def test_a_child_that_is_killed_is_started_again_until_that_does_not_help(start: Start, tmp_path: Path) -> None:
    process = start("hung")
    pids(tmp_path, "coordinator", "hung")
    for _ in range(MOST_RESTARTS + 1):
        (worker,) = pids(tmp_path, "hung")
        (tmp_path / "hung.pid").unlink()
        os.kill(worker, signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count("worker-0 was killed by SIGKILL; starting it again") == MOST_RESTARTS
    assert "shardlane: worker-0 was killed by SIGKILL" in errors


def test_a_refusal_of_the_coordinator_is_passed_on_in_its_own_words(start: Start, tmp_path: Path) -> None:
    process = start("refused")
    output, errors = process.communicate(timeout=30)
    assert errors.splitlines()[-1] == "shardlane.errors.UserError: cannot resume: train.seed was 1 and is now 2"
    assert "accepted" not in output  # the folder's config is left as it is


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_the_coordinator_to_stop_and_waits(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("steady")
    pids(tmp_path, "coordinator", "steady")
    time.sleep(1.0)  # until it has heard that the run trains
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "accepted" in output and "with a checkpoint" in output
    assert (tmp_path / "stopped").exists()


def test_a_second_signal_stops_at_once(start: Start, tmp_path: Path) -> None:
    process = start("hung")
    children = pids(tmp_path, "coordinator", "steady", "hung")
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert wait_for((tmp_path / "stopped").exists)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stopped at once" in output
    assert not any(map(is_running, children))


def test_no_child_outlives_a_supervisor_that_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("hung")
    children = pids(tmp_path, "coordinator", "steady", "hung")
    process.kill()
    assert wait_for(lambda: not any(map(is_running, children)), seconds=5.0)


def test_stopping_kills_who_does_not_listen(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with Supervisor(tmp_path, child_environment(os.environ, threads=1)) as supervisor:
        child = supervisor.start("deaf", [sys.executable, "-c", deaf])
        assert wait_for(lambda: child.last_lines(1) == ["up"])
        supervisor.stop(grace_seconds=0.2)
        assert child.how_it_ended == "was killed by SIGKILL"


def test_last_lines_are_of_this_life_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "worker-0.log").write_text("of an earlier run\n")
    with Supervisor(tmp_path, child_environment(os.environ, threads=1)) as supervisor:
        child = supervisor.start("worker-0", [sys.executable, "-c", "print(1); print(2); print(3)"])
        assert supervisor.wait(20) and supervisor.failed == []
        assert child.last_lines(2) == ["2", "3"] and child.last_lines(9) == ["1", "2", "3"]
    assert (tmp_path / "worker-0.log").read_text() == "of an earlier run\n1\n2\n3\n"


def test_what_cannot_be_started_is_the_users_error(tmp_path: Path) -> None:
    with Supervisor(tmp_path, dict(os.environ)) as supervisor, pytest.raises(UserError, match="cannot start worker-0"):
        supervisor.start("worker-0", [str(tmp_path / "nothing")])


def test_children_get_the_threads_of_the_config_and_no_settings_of_the_callers() -> None:
    caller = {"SHARDLANE_CLUSTER__STAGES": "3", "SHARDLANE_BIND": "0.0.0.0:1", "OMP_NUM_THREADS": "64", "HOME": "/root"}
    made = child_environment(caller, threads=2)
    assert made["OMP_NUM_THREADS"] == "2" and made["GRPC_ENABLE_FORK_SUPPORT"] == "0" and made["HOME"] == "/root"
    assert made["MALLOC_TRIM_THRESHOLD_"] and made["MALLOC_MMAP_THRESHOLD_"] and made["MALLOC_TOP_PAD_"]
    assert [name for name in made if name.startswith("SHARDLANE_")] == ["SHARDLANE_PARENT_PID"]
