"""What every test stands on: a pinned environment, and skips that say why."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# Before anything imports torch or grpc. One thread: their number is part of the numerics class.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(REPOSITORY / ".pytest_cache" / "hypothesis"))
# A developer's own settings must not reach the tests.
for _name in [name for name in os.environ if name.startswith("SHARDLANE_")]:
    del os.environ[_name]

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# No deadline: two busy cores make any example slow now and then. Derandomized: a red run is red again.
hypothesis.settings.register_profile("shardlane", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shardlane")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("docker") and (reason := _no_docker()):
        pytest.skip(reason)
    if item.get_closest_marker("gpu") and (reason := _no_gpu()):
        pytest.skip(reason)


@functools.cache
def _no_docker() -> str:
    """Why the docker tests cannot run; empty when they can."""
    if shutil.which("docker") is None:
        return "there is no docker client"
    try:
        answer = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "docker info did not answer within 20 s"
    if answer.returncode:
        return "no engine answers docker info"
    compose = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, timeout=20, check=False)
    return "" if compose.returncode == 0 else "the docker client has no compose"


@functools.cache
def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def run_python() -> Callable[[str], str]:
    """Runs code in a fresh interpreter at the root of the checkout, within 60 s; returns its output, fails with its traceback."""

    def run(code: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
