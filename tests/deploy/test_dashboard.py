"""The dashboard asks only for metrics and labels that the services export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from coordinator.instruments import Instruments
from ps_service.instruments import ShardInstruments
from shardlane.metrics import Metrics
from shardlane.top_k import Residuals
from worker_service.instruments import WorkerInstruments

OF_PROMETHEUS = {"job", "instance", "le"}
WORDS = {"by", "ignoring", "group_left", "on", "without", "offset", "bool"}


def exported() -> dict[str, set[str]]:
    """Label names by metric, of all services: histograms by their three series, counters with their `_total`."""
    shard, worker, coordinator = Metrics("shard"), Metrics("worker"), Metrics("coordinator")
    ShardInstruments(shard).watch(MagicMock())
    WorkerInstruments(worker).watch(lambda: 0.0, lambda: 0.0, lambda: 0.0, Residuals())
    Instruments(coordinator, MagicMock(), lambda: 0.0)
    found: dict[str, set[str]] = {}
    for metrics in (shard, worker, coordinator):
        metrics.observer("unary_unary", "service", "Method", lambda request, context: request)
        for family in metrics.registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            labels = {label for sample in family.samples for label in sample.labels}
            for suffix in suffixes:
                found.setdefault(family.name + suffix, set()).update(labels)
    found["shardlane_shard_contributions_total"].add("outcome")  # has no child before the first contribution
    return found


def panels(repository: Path) -> list[dict[str, Any]]:
    dashboard = json.loads((repository / "deploy/grafana/dashboards/training.json").read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(repository: Path) -> list[str]:
    return [target["expr"] for panel in panels(repository) for target in panel["targets"]]


def metrics_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|ignoring|on|without) \([^)]*\)", " ", expression)
    return set(re.findall(r"\b[a-z_]\w*\b(?!\s*\()", bare)) - WORDS


def labels_in(expression: str) -> Iterator[str]:
    for inside in re.findall(r"\{([^}]*)\}", expression):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)
    for inside in re.findall(r"\b(?:by|ignoring|on|without) \(([^)]*)\)", expression):
        yield from re.findall(r"\w+", inside)


def test_every_metric_and_label_is_exported(repository: Path) -> None:
    known = exported()
    for expression in expressions(repository):
        names = metrics_in(expression)
        assert names, expression
        assert names <= known.keys(), expression
        labels = OF_PROMETHEUS.union(*(known[name] for name in names))
        assert set(labels_in(expression)) <= labels, expression


@pytest.mark.parametrize(
    "expression",
    ["rate(shardlane_worker_steps_total[1m])", "shardlane_coordinator_loss", "shardlane_worker_step_seconds", "nonsense"],
)
def test_an_unknown_metric_is_found(expression: str) -> None:
    assert not metrics_in(expression) <= exported().keys()


def test_counters_are_shown_as_rates(repository: Path) -> None:
    """But for those whose every single event is news."""
    rare = r"alarms|broken_streams|failures|plans"
    for expression in expressions(repository):
        for name in metrics_in(expression):
            if name.endswith(("_total", "_bucket")) and not re.search(rare, name):
                assert re.search(rf"rate\({name}(\{{[^}}]*\}})?\[\$__rate_interval\]\)", expression), expression


def test_it_shows_what_people_look_for(repository: Path) -> None:
    """A panel that is lost is missed."""
    shown = set().union(*map(metrics_in, expressions(repository)))
    wanted = """shardlane_coordinator_steps_done shardlane_coordinator_loss_nats shardlane_coordinator_tokens_per_second
        shardlane_coordinator_grad_norm shardlane_coordinator_learning_rate shardlane_worker_phase_seconds_total
        shardlane_worker_pushed_bytes_total shardlane_worker_gradient_bytes_total shardlane_worker_pulled_bytes_total
        grpc_server_handled_total
        grpc_server_handling_seconds_bucket shardlane_coordinator_lease_age_seconds shardlane_coordinator_skipped_steps
        shardlane_worker_push_queue_bytes shardlane_worker_inbox_bytes shardlane_shard_apply_seconds_bucket
        shardlane_build_info shardlane_worker_staleness_versions_bucket shardlane_coordinator_clock_spread_steps
        shardlane_worker_residual_norm shardlane_shard_contributions_total"""
    assert set(wanted.split()) <= shown


def test_panels_are_sound(repository: Path) -> None:
    """Ids and titles are unique, each says what it shows, and none lies over another."""
    found = panels(repository)
    assert len({panel["id"] for panel in found}) == len({panel["title"] for panel in found}) == len(found)
    cells: set[tuple[int, int]] = set()
    for panel in found:
        place = panel["gridPos"]
        own = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert panel["description"] and not own & cells and place["x"] + place["w"] <= 24
        cells |= own


def test_provisioning_names_the_same_source_and_folder(repository: Path) -> None:
    folder = repository / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels(repository)} == {source["uid"]}
    [provider] = yaml.safe_load((folder / "dashboards/shardlane.yml").read_text(encoding="utf-8"))["providers"]
    compose = yaml.safe_load((repository / "docker-compose.yml").read_text(encoding="utf-8"))
    mounted = {volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]}
    assert provider["options"]["path"] in mounted
