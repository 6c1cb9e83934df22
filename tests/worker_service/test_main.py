"""`python -m worker_service`: a person's mistakes are one line and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "worker_service: --coordinator is missing, and so is SHARDLANE_COORDINATOR; give one of them"),
        (["--coordinator", "x:1", "--device", "tpu"], "worker_service: --device is 'tpu'; expected one of auto, cpu, cuda"),
        (
            ["--coordinator", "x:1", "--bind", "0.0.0.0:0"],
            "worker_service: --bind 0.0.0.0:0 can be reached from other machines, in plain text;"
            " give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, add --insecure, or bind 127.0.0.1",
        ),
    ],
)
def test_a_wrong_flag(flags: list[str], line: str, repository: Path) -> None:
    command = [sys.executable, "-m", "worker_service", *flags]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr.strip(), result.stdout) == (2, line, "")


def test_torch_waits_for_the_config(repository: Path) -> None:
    code = "import sys, worker_service.__main__; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "False\n"
