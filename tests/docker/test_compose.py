"""`docker compose up --detach --wait` trains, and the Prometheus beside it sees every process, answers every panel and alerts."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_dashboards import expressions
from tests.deploy.test_rules import alerts, recorded, rules
from tests.docker.project import Project

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

PROGRESS_SECONDS = 180
TARGETS = {"coordinator": 1, "shard": 2, "worker": 4, "prometheus": 1}
STEPS = 20  # enough for the demo's loss to fall clearly, warm-up included
# Trains for as long as these tests look, and validates soon.
LONGER = """
x-longer: &longer
  SHARDLANE_TRAIN__MAX_STEPS: "100000"
  SHARDLANE_VALIDATION__EVERY_STEPS: "25"
  SHARDLANE_VALIDATION__NUM_MICRO_BATCHES: "2"
services:
  prepare: {environment: *longer}
  coordinator: {environment: *longer}
"""
# Empty while all is well.
OF_FAULTS = r'grpc_code!="OK"|recovery_seconds_sum|ALERTS|changes\('


@pytest.fixture(scope="module")
def project(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    override = tmp_path_factory.mktemp("compose") / "longer.yml"
    override.write_text(LONGER)
    made = Project(repository, override)
    try:
        made.start()
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


def of_panels(repository: Path) -> set[str]:
    return {each.replace("$__rate_interval", "1m").replace("$run", "compose") for each in expressions(repository)}


def selectors(expression: str) -> list[str]:
    """What a rule reads."""
    found = re.findall(r"(?<![\w:])((?:[a-z_]+:)?(?:shardlane|grpc_server)_[\w:]+|up)\b(\{[^}]*\})?", expression)
    return ["".join(each) for each in found]


def test_every_panel_answers(project: Project, repository: Path) -> None:
    """While it trains: a panel whose query gives nothing then never will."""
    usual = {each for each in of_panels(repository) if not re.search(OF_FAULTS, each)}
    assert len(usual) > 90
    wait_until(lambda left: left == set(), lambda: {each for each in usual if not project.answers(each)}, project)


def test_every_rule_reads_what_is_there_and_no_alert_fires(project: Project, repository: Path) -> None:
    read = {each for rule in rules(repository) for each in selectors(rule["expr"]) if "PermissionDenied" not in each}
    read |= recorded(repository).keys()
    wait_until(lambda left: left == set(), lambda: {each for each in read if not project.answers(each)}, project)
    loaded = [rule for group in project.prometheus("rules")["groups"] for rule in group["rules"]]
    assert [rule["health"] for rule in loaded] == ["ok"] * len(rules(repository)), [rule.get("lastError") for rule in loaded]
    assert {rule["name"]: rule["state"] for rule in loaded if rule.get("state") == "firing"} == {}
    assert {rule["name"] for rule in loaded if rule["type"] == "alerting"} == alerts(repository).keys()


def test_the_status_page_is_there_and_nobody_joined_without_a_token(project: Project) -> None:
    address = project.compose("port", "coordinator", "8080").strip()
    with urllib.request.urlopen(f"http://{address}/status.json", timeout=10) as response:
        assert response.headers["X-Shardlane-Control"] == "off"
        assert len(json.load(response)["members"]) == 6
    # Counted by this coordinator's process, so before it is killed; who has been in before shows no token again.
    assert (project.value('sum(shardlane_coordinator_admissions_total{outcome="admitted"})') or 0) >= 6
    assert project.value('sum(shardlane_coordinator_admissions_total{outcome!~"admitted|repeated|readmitted"})') == 0


def test_every_panel_about_faults_answers_during_faults(project: Project, repository: Path) -> None:
    """A worker dies, a certificate is used for what it is not for, and the coordinator is away until its alert fires."""
    worker, coordinator = (project.compose("ps", "--quiet", service).split()[0] for service in ("worker", "coordinator"))
    project.engine("kill", worker)
    wait_until(lambda count: count == 3, lambda: project.value('shardlane_coordinator_members{role="worker"}'), project)
    shown = project.value("shardlane_coordinator_steps_done") or 0.0
    wait_until(lambda done: (done or 0) > shown, lambda: project.value("shardlane_coordinator_steps_done"), project)
    as_shard = "mkdir /tmp/x; cp /certs/ca.pem /tmp/x; for end in pem key; do cp /certs/shard.$end /tmp/x/operator.$end; done"
    said = project.compose(
        *("exec", "-T", "shard", "sh", "-c"),
        f"{as_shard}; python -m shardlane.cli pause coordinator:7070 --certs /tmp/x 2>&1 || true",
    )
    assert "Control is for operator; the caller has a certificate of role shard" in said
    wait_until(bool, lambda: project.answers('grpc_server_handled_total{grpc_code="PermissionDenied"}'), project)

    project.engine("kill", coordinator)
    firing = 'ALERTS{alertname="ShardlaneCoordinatorDown", alertstate="firing"}'
    wait_until(bool, lambda: project.answers(firing), project)
    faults = {each for each in of_panels(repository) if re.search(OF_FAULTS, each)}
    assert len(faults) >= 6
    # Within the last minutes: a plan is made in a moment.
    asked = {each: f"last_over_time(({each})[5m:5s])" for each in faults}
    wait_until(lambda left: left == set(), lambda: {each for each, query in asked.items() if not project.answers(query)}, project)
    project.engine("start", coordinator, worker)
    wait_until(lambda fires: not fires, lambda: project.answers(firing), project)
    wait_until(lambda count: count == 4, lambda: project.value('shardlane_coordinator_members{role="worker"}'), project)


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
