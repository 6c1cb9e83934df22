"""`python -m coordinator` as a process: its flags, its ready file, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardlane.config import to_toml
from shardlane.member import fetch_run
from tests.coordinator.cast import small_config, write_token_folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_token_folder(tmp_path / "data")
    (tmp_path / "config.toml").write_text(to_toml(small_config()))
    return tmp_path


@contextmanager
def process(run_dir: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "coordinator", "--config", str(run_dir / "config.toml"), "--run-dir", str(run_dir), *flags]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def ready(run_dir: Path) -> dict[str, str]:
    file, end = run_dir / "ready.json", time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    values: dict[str, str] = json.loads(file.read_text())
    return values


def test_serves_until_sigterm(run_dir: Path) -> None:
    environment = {"SHARDLANE_READY_FILE": str(run_dir / "ready.json"), "SHARDLANE_TRAIN__MAX_STEPS": "3"}
    with process(run_dir, "--train.seed", "7", environment=environment) as started:
        values = ready(run_dir)
        assert values["pid"] == started.pid and values["metrics_address"].startswith("127.0.0.1:")
        run = fetch_run(values["address"])
        assert (run.config.train.max_steps, run.config.train.seed) == (3, 7)
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0


def test_ends_with_its_parent(run_dir: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as parent:
        flags = ("--ready-file", str(run_dir / "ready.json"))
        with process(run_dir, *flags, environment={"SHARDLANE_PARENT_PID": str(parent.pid)}) as started:
            ready(run_dir)
            parent.kill()  # not waited for yet: a zombie counts as gone
            started.wait(4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--train.lanes", "3"), "lanes is 3; it must be a power of two"),
        (("--train.lane", "4"), "did you mean 'lanes'?"),
        (("--bind", "0.0.0.0:0"), "add --insecure"),
        (("--bind", "192.0.2.1:0", "--insecure"), "cannot listen on 192.0.2.1:0"),
        (("--config", ""), "--config is missing"),
        (("--data.path", "/nowhere"), "there is no token folder /nowhere"),
    ],
)
def test_user_errors_are_one_line(run_dir: Path, flags: tuple[str, ...], says: str) -> None:
    with process(run_dir, *flags) as started:
        _, errors = started.communicate(timeout=30)
        lines = [line for line in errors.splitlines() if "| " not in line]  # but for the log
        assert started.returncode == 2 and len(lines) == 1 and says in lines[0] and lines[0].startswith("coordinator: ")


def test_help_teaches() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "coordinator", "--help"], capture_output=True, text=True, timeout=30, check=True
    )
    assert "--fork-run" in found.stdout and "SHARDLANE_BIND" in found.stdout
