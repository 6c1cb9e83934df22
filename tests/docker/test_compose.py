"""`docker compose up --detach --wait` trains, and the Prometheus beside it sees every process and answers every panel."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

BUILD_SECONDS = 480
UP_SECONDS = 300
PROGRESS_SECONDS = 180
TARGETS = {"coordinator": 1, "shard": 2, "worker": 4, "prometheus": 1}
STEPS = 20  # enough for the demo's loss to fall clearly, warm-up included


class Project:
    """One compose project of a name of its own: several may run on one engine."""

    def __init__(self, repository: Path) -> None:
        self.name = f"shardlane-test-{secrets.token_hex(4)}"
        self._repository = repository
        ours = {"SHARDLANE_IMAGE": f"{self.name}:latest", "COORDINATOR_PORT": "0", "PROMETHEUS_PORT": "0", "STATUS_PORT": "0"}
        self._environment = {**os.environ, **ours}

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

    def containers(self) -> list[str]:
        """`service status exit-code` of each; from the engine, since releases of Compose print it differently."""
        ids = self.compose("ps", "--all", "--quiet").split()
        what = '{{index .Config.Labels "com.docker.compose.service"}} {{.State.Status}} {{.State.ExitCode}}'
        return self._run("docker", "inspect", "--format", what, *ids, seconds=60).stdout.splitlines()

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


@pytest.fixture(scope="module")
def project(repository: Path) -> Iterator[Project]:
    made = Project(repository)
    try:
        made.compose("build", seconds=BUILD_SECONDS)
        made.compose("up", "--detach", "--wait", seconds=UP_SECONDS)
        yield made
    finally:
        made.remove()


def wait_until(is_wanted: Callable[[Any], bool], ask: Callable[[], Any], project: Project) -> None:
    """Asks once a second; what was found last is told if it is never what is wanted."""
    end = time.monotonic() + PROGRESS_SECONDS
    while not is_wanted(found := ask()):
        assert time.monotonic() < end, f"{PROGRESS_SECONDS} s, and still {found}\n{project.compose('logs', '--tail', '20')}"
        time.sleep(1.0)


def test_every_target_is_up(project: Project) -> None:
    def found() -> dict[str, list[str]]:
        targets = project.prometheus("targets", state="active")["activeTargets"]
        return {job: [each["health"] for each in targets if each["labels"]["job"] == job] for job in TARGETS}

    expected = {job: ["up"] * count for job, count in TARGETS.items()}
    wait_until(lambda health: health == expected, found, project)


def test_it_trains_and_the_loss_falls(project: Project) -> None:
    # No scrape need have seen the first loss, the one near ln(vocabulary): it is in the coordinator's own rows.
    wait_until(
        lambda done: done is not None and done >= STEPS, lambda: project.value("shardlane_coordinator_steps_done"), project
    )
    text = project.compose("exec", "-T", "coordinator", "head", "-n", str(STEPS + 5), "/runs/compose/metrics.jsonl")
    rows = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    losses = [row["loss"] for row in rows]
    assert len(losses) >= STEPS
    assert sum(losses[STEPS - 5 : STEPS]) / 5 < 0.9 * losses[0], losses
    newest = project.value("shardlane_coordinator_loss_nats")
    assert newest is not None and newest < losses[0]
    assert '"event": "trained"' in project.compose("logs", "--no-color", "coordinator")


def test_every_panel_answers(project: Project, repository: Path) -> None:
    """While it trains: a panel whose query gives nothing then never will."""
    dashboard = json.loads((repository / "deploy/grafana/dashboards/training.json").read_text(encoding="utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions = {target["expr"].replace("$__rate_interval", "1m") for target in targets}
    # These are empty while all is well.
    quiet = {
        each for each in expressions if re.search(r'grpc_code!="OK"|outcome!~|validation_loss|shardlane_worker_loss > 0', each)
    }

    def unanswered() -> set[str]:
        return {each for each in expressions - quiet if not project.prometheus("query", query=each)["result"]}

    wait_until(lambda left: left == set(), unanswered, project)
    for each in quiet:
        project.prometheus("query", query=each)  # an expression that does not parse is HTTP 400


@pytest.mark.parametrize("service", ["coordinator", "shard", "worker"])
def test_metrics_are_as_prometheus_advises(project: Project, service: str) -> None:
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9100/metrics').read().decode(), end='')"
    text = project.compose("exec", "-T", service, "python", "-c", code)
    assert "shardlane_build_info" in text
    project.compose("exec", "-T", "prometheus", "promtool", "check", "metrics", stdin=text)


def test_commands_reach_the_coordinator(project: Project) -> None:
    """As the head of docker-compose.yml says it."""
    shown = project.compose("run", "--rm", "-T", "prepare", "shardlane.cli", "status", "coordinator:7070")
    assert "replica 1" in shown and "shard 1" in shown


def test_the_status_page_is_there_and_nobody_joined_without_a_token(project: Project) -> None:
    address = project.compose("port", "coordinator", "8080").strip()
    with urllib.request.urlopen(f"http://{address}/status.json", timeout=10) as response:
        assert response.headers["X-Shardlane-Control"] == "off"
        assert len(json.load(response)["members"]) == 6
    assert (project.value('sum(shardlane_coordinator_joins_total{outcome="admitted"})') or 0) >= 6
    assert project.value('sum(shardlane_coordinator_joins_total{outcome!~"admitted|repeated"})') == 0


def test_containers_are_not_root_and_hold_no_installer(project: Project) -> None:
    assert project.compose("exec", "-T", "worker", "id", "-u").strip() == "10001"
    code = "import importlib.util as u, sys; sys.exit(bool(u.find_spec('pip')))"
    project.compose("exec", "-T", "worker", "python", "-c", code)


def test_nothing_goes_wrong_unseen(project: Project) -> None:
    """Health checks included, which come and go all the time."""
    logs = project.compose("logs", "--no-color", "coordinator", "shard", "worker")
    assert "Traceback" not in logs and '"level": "error"' not in logs


def test_every_service_stops_within_its_grace(project: Project) -> None:
    """In the midst of training; the last test, for it leaves nothing running. A service that must be killed has 137."""
    project.compose("stop", seconds=120)
    assert "Traceback" not in project.compose("logs", "--no-color", "coordinator", "shard", "worker")
    expected = [f"{service} exited 0" for service, count in (TARGETS | {"prepare": 1, "certs": 1}).items() for _ in range(count)]
    assert sorted(project.containers()) == sorted(expected)
