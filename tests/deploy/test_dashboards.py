"""The dashboards are what the code makes, and ask only for metrics and labels that the services export."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.exported import exported, faults_of, metrics_in

NAMES = ("training", "shards", "pipeline")
OF_ALERTS = {"ALERTS": {"alertname", "alertstate", "severity"}}


def dashboards(repository: Path) -> dict[str, dict[str, Any]]:
    folder = repository / "deploy/grafana/dashboards"
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(repository: Path) -> list[str]:
    """Of panels and annotations."""
    found = dashboards(repository).values()
    targets = [target["expr"] for each in found for panel in panels(each) for target in panel["targets"]]
    return targets + [annotation["expr"] for each in found for annotation in each["annotations"]["list"]]


def recorded(repository: Path) -> dict[str, set[str]]:
    """Labels by the name of a recording rule, whose level says them."""
    groups = yaml.safe_load((repository / "deploy/prometheus/rules/shardlane.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule["record"]: set(rule["record"].split(":")[0].split("_")) for rule in rules if "record" in rule}


def test_they_are_what_the_code_makes(repository: Path, tmp_path: Path) -> None:
    """If not: make dashboards."""
    subprocess.run([sys.executable, "-m", "deploy.grafana", str(tmp_path)], cwd=repository, check=True, timeout=60)
    made = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text(encoding="utf-8") for file in (repository / "deploy/grafana/dashboards").iterdir()}
    assert made == kept and set(made) == {f"{name}.json" for name in NAMES}


def test_every_metric_and_label_is_exported(repository: Path) -> None:
    known = exported() | recorded(repository) | OF_ALERTS
    assert [fault for each in expressions(repository) for fault in faults_of(each, known)] == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(shardlane_worker_steps_total[1m])", "shardlane_worker_steps_total in"),
        ("shardlane_coordinator_loss", "shardlane_coordinator_loss in"),
        ("shardlane_worker_step_seconds", "shardlane_worker_step_seconds in"),
        ("run:shardlane_goodput:ratio_rate6m", "run:shardlane_goodput:ratio_rate6m in"),
        ("sum by (phase) (shardlane_worker_loss)", "label phase in"),
        ('shardlane_worker_loss{role="x"}', "label role in"),
        ("vector(1)", "no metric in"),
    ],
)
def test_what_is_not_exported_is_found(expression: str, fault: str) -> None:
    [found] = faults_of(expression, exported())
    assert found.startswith(fault)


def test_every_selector_is_of_the_run_that_is_looked_at(repository: Path) -> None:
    for expression in expressions(repository):
        selectors = re.findall(r'\{run=~"\$run"', expression)
        names = re.findall(rf"(?<![\w:])(?:{'|'.join(map(re.escape, metrics_in(expression)))})(?![\w:])", expression)
        assert len(selectors) == len(names), expression


def test_counters_are_shown_as_rates(repository: Path) -> None:
    """But for those whose every single event is news."""
    rare = r"alarms|broken_streams|failures|plans|mismatches|skipped|departures"
    for expression in expressions(repository):
        for name in metrics_in(expression):
            if name.endswith(("_total", "_bucket")) and not re.search(rare, name):
                assert re.search(rf"(rate|increase)\({name}\{{[^}}]*\}}\[(\$__rate_interval|5m|1h)\]\)", expression), expression


def test_they_show_what_people_look_for(repository: Path) -> None:
    """A panel that is lost is missed: every metric of ours is in one, or says here why not."""
    shown = set().union(*map(metrics_in, expressions(repository)))
    elsewhere = {
        "grpc_server_started_total",  # its rate is that of calls that end, but for streams
        "grpc_server_msg_received_total",
        "grpc_server_msg_sent_total",
    }
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported() if name.startswith(("shardlane_", "grpc_"))}
    assert ours - elsewhere - families == set()


def test_panels_are_sound(repository: Path) -> None:
    """Ids and titles are unique, each says what it shows, and none lies over another."""
    found = dashboards(repository)
    assert len({each["uid"] for each in found.values()}) == len({each["title"] for each in found.values()}) == len(NAMES)
    for dashboard in found.values():
        ids = [panel["id"] for panel in dashboard["panels"]]
        titles = [panel["title"] for panel in panels(dashboard)]
        assert len(set(ids)) == len(ids) and len(set(titles)) == len(titles)
        cells: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            own = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
            assert not own & cells and place["x"] + place["w"] <= 24
            cells |= own
        assert all(panel["description"] and panel["targets"] for panel in panels(dashboard))
        assert all({"unit", "custom", "mappings"} & panel["fieldConfig"]["defaults"].keys() or panel["type"] == "heatmap"
                   for panel in panels(dashboard))  # fmt: skip


def test_provisioning_names_the_same_source_and_folder(repository: Path) -> None:
    folder = repository / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    for dashboard in dashboards(repository).values():
        variables = {each["name"]: each for each in dashboard["templating"]["list"]}
        assert {panel["datasource"]["uid"] for panel in panels(dashboard)} == {"${datasource}"}
        assert variables["datasource"]["current"] == {"text": source["name"], "value": source["uid"]}
        assert variables["run"]["allValue"] == ".*"
    [provider] = yaml.safe_load((folder / "dashboards/shardlane.yml").read_text(encoding="utf-8"))["providers"]
    compose = yaml.safe_load((repository / "docker-compose.yml").read_text(encoding="utf-8"))
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in compose["services"]["grafana"]["volumes"]}
    assert mounted[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"]) and Path(home).stem in NAMES
