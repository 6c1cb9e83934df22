"""Prometheus' own checker: the one on PATH, or the one in the image that Compose runs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

IMAGE = os.environ.get("PROMETHEUS_IMAGE", "prom/prometheus:latest")


def promtool(*arguments: str, folder: Path, stdin: str = "") -> str:
    """What it says, run in `folder`; fails with that if it finds a fault. Skips where there is none."""
    if shutil.which("promtool"):
        command = ["promtool", *arguments]
    elif not (reason := _no_image()):
        mount = ["--volume", f"{folder}:/checked:ro", "--workdir", "/checked"]
        command = ["docker", "run", "--rm", "--interactive", *mount, "--entrypoint", "promtool", IMAGE, *arguments]
    else:
        pytest.skip(f"there is no promtool on PATH, and {reason}")
    result = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@functools.cache
def _no_image() -> str:
    if shutil.which("docker") is None:
        return "there is no docker client"
    try:
        found = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "docker did not answer within 20 s"
    return f"no engine answers that has the image {IMAGE}" if found.returncode else ""
