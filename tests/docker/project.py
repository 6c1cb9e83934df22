"""A compose project of a test's own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

BUILD_SECONDS = 480
UP_SECONDS = 420


class Project:
    """One compose project of a name of its own: several may run on one engine."""

    def __init__(self, repository: Path, override: Path) -> None:
        self.name = f"shardlane-test-{secrets.token_hex(4)}"
        self._repository = repository
        ours = {"SHARDLANE_IMAGE": f"{self.name}:latest", "COORDINATOR_PORT": "0", "PROMETHEUS_PORT": "0", "STATUS_PORT": "0"}
        ours["COMPOSE_FILE"] = f"{repository / 'docker-compose.yml'}{os.pathsep}{override}"
        self._environment = {**os.environ, **ours}

    def start(self, *services: str) -> None:
        """Builds, and returns when all, or `services` and what they need, are healthy."""
        self.compose("build", seconds=BUILD_SECONDS)
        self.compose("up", "--detach", "--wait", *services, seconds=UP_SECONDS)

    def compose(self, *arguments: str, seconds: float = 60, stdin: str = "") -> str:
        result = self._run("docker", "compose", "--project-name", self.name, *arguments, seconds=seconds, stdin=stdin)
        assert result.returncode == 0, f"docker compose {' '.join(arguments)}:\n{result.stdout}\n{result.stderr[-4000:]}"
        return result.stdout

    def prometheus(self, path: str, **query: str) -> Any:
        address = self.compose("port", "prometheus", "9090").strip()
        with urllib.request.urlopen(f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as response:
            return json.load(response)["data"]

    def value(self, expression: str) -> float | None:
        """Of an instant query with one answer; None while there is none."""
        result = self.prometheus("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None

    def answers(self, expression: str) -> bool:
        return bool(self.prometheus("query", query=expression)["result"])

    def engine(self, *arguments: str) -> str:
        result = self._run("docker", *arguments, seconds=60)
        assert result.returncode == 0, f"docker {' '.join(arguments)}:\n{result.stderr}"
        return result.stdout

    def containers(self) -> list[str]:
        """`service status exit-code` of each; from the engine, since releases of Compose print it differently."""
        ids = self.compose("ps", "--all", "--quiet").split()
        what = '{{index .Config.Labels "com.docker.compose.service"}} {{.State.Status}} {{.State.ExitCode}}'
        return self.engine("inspect", "--format", what, *ids).splitlines()

    def remove(self) -> None:
        """Also after a failed or interrupted start."""
        self._run("docker", "compose", "--project-name", self.name, "down", "--volumes", "--timeout", "5", seconds=120)
        self._run("docker", "image", "rm", "--force", f"{self.name}:latest", seconds=60)

    def _run(self, *command: str, seconds: float, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self._repository,
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
