"""What dashboards are made of, as Grafana's JSON: pure functions of titles and expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
_METRIC = re.compile(r"(?<![\w:])((?:\w+:)?(?:shardlane|process|grpc_server)_[\w:]+|ALERTS\b)(\{)?")  # recorded ones included


def of_run(expression: str) -> str:
    """The expression about the run that the dashboard's variable names: every selector in it is told so."""
    return _METRIC.sub(lambda found: f'{found[1]}{{run=~"$run"' + (", " if found[2] else "}"), expression)


def rate(counter: str) -> str:
    return f"rate({counter}[$__rate_interval])"


def quantile(q: float, histogram: str, by: str = "le", selector: str = "") -> str:
    return f"histogram_quantile({q}, sum by ({by}) ({rate(f'{histogram}_bucket{selector}')}))"


def median_and_worst(histogram: str) -> dict[str, str]:
    return {"median": quantile(0.5, histogram), "99th percentile": quantile(0.99, histogram)}


def by_seat(expression: str, by: str = "stage") -> str:
    """A worker's series, by the stage (or the replica) that it sits in; without a seat it has none."""
    return f"sum by ({by}) ({expression} * on (run, instance) group_left (replica, stage) shardlane_worker_seat_info)"


# ---- panels: `queries` are expressions by legend; a width of Grafana's 24 columns -------------------------------------------


def stat(
    title: str, description: str, expression: str, *, unit: str = "none", decimals: int | None = None,
    legend: str = "", mappings: Mapping[int, str] | None = None, width: int = 3,
) -> Json:  # fmt: skip
    defaults: Json = {"unit": unit}
    if decimals is not None:
        defaults["decimals"] = decimals
    if mappings is not None:
        defaults["mappings"] = [_mapping(mappings)]
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none"}
    return _panel("stat", title, description, {legend: expression}, defaults, options, width=width, height=4)


def series(
    title: str, description: str, queries: Mapping[str, str], *, unit: str = "none", width: int = 8, is_stacked: bool = False,
    is_logarithmic: bool = False, soft_max: float | None = None,
) -> Json:  # fmt: skip
    custom: Json = {"lineWidth": 1, "fillOpacity": 60 if is_stacked else 0, "showPoints": "never"}
    if is_stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    if is_logarithmic:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    if soft_max is not None:
        custom |= {"axisSoftMin": 0, "axisSoftMax": soft_max}
    options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return _panel("timeseries", title, description, queries, {"unit": unit, "custom": custom}, options, width=width)


def heatmap(title: str, description: str, histogram: str, *, unit: str = "none", width: int = 8) -> Json:
    """How many observations fell into each bucket of a histogram, over time."""
    expression = f"sum by (le) (increase({histogram}_bucket[$__rate_interval]))"
    options = {"calculate": False, "yAxis": {"unit": unit}, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64}}
    panel = _panel("heatmap", title, description, {"{{le}}": expression}, {}, options, width=width)
    panel["targets"][0]["format"] = "heatmap"
    return panel


def timeline(title: str, description: str, queries: Mapping[str, str], mappings: Mapping[int, str], *, width: int = 8) -> Json:
    """States over time, a bar for each series."""
    options = {"showValue": "auto", "legend": {"displayMode": "list", "placement": "bottom"}}
    return _panel("state-timeline", title, description, queries, {"mappings": [_mapping(mappings)]}, options, width=width)


def _mapping(texts: Mapping[int, str]) -> Json:
    return {"type": "value", "options": {str(value): {"text": text, "index": value} for value, text in texts.items()}}


def _panel(
    kind: str, title: str, description: str, queries: Mapping[str, str], defaults: Json, options: Json,
    *, width: int, height: int = 8,
) -> Json:  # fmt: skip
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"h": height, "w": width},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": of_run(expression), "legendFormat": legend}
            for index, (legend, expression) in enumerate(queries.items())
        ],
    }


# ---- a dashboard --------------------------------------------------------------------------------------------------------------


def dashboard(uid: str, title: str, rows: Mapping[str, Sequence[Json]]) -> Json:
    """`rows`: panels by the row's title, laid from left to right in lines as high as their highest."""
    return {
        "uid": uid,
        "title": title,
        "tags": ["shardlane"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "templating": {"list": [_SOURCES, _RUNS]},
        "annotations": {"list": [_PLANS, _ALERTS]},
        "links": [_OTHERS],
        "panels": _laid(rows),
    }


_SOURCES: Json = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "current": {"text": "Prometheus", "value": "prometheus"},
}
_RUNS: Json = {
    "name": "run",
    "label": "Run",
    "type": "query",
    "datasource": SOURCE,
    "query": {"query": "label_values(shardlane_build_info, run)", "refId": "run"},
    "refresh": 2,  # whenever the time range changes
    "sort": 1,
    "includeAll": True,
    "allValue": ".*",  # which also matches a scrape that sets no label `run`
    "current": {"text": "All", "value": "$__all"},
}


def _annotation(name: str, expression: str, colour: str, title: str, text: str) -> Json:
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "expr": of_run(expression),
        "iconColor": colour,
        "step": "15s",
        "titleFormat": title,
        "textFormat": text,
    }


_PLANS = _annotation("Plans", "changes(shardlane_coordinator_plan_epoch[15s]) > 0", "blue", "A new plan", "{{run}}")
_ALERTS = _annotation("Alerts", 'ALERTS{alertname=~"Shardlane.*", alertstate="firing"}', "red", "{{alertname}}", "{{severity}}")
_OTHERS: Json = {"type": "dashboards", "tags": ["shardlane"], "title": "Shardlane", "includeVars": True, "keepTime": True}


def _laid(rows: Mapping[str, Sequence[Json]]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for title, panels in rows.items():
        placed.append({"id": len(placed) + 1, "type": "row", "title": title, "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}})
        y, x, height = y + 1, 0, 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > COLUMNS:
                y, x, height = y + height, 0, 0
            placed.append({"id": len(placed) + 1, **panel, "gridPos": {**size, "x": x, "y": y}})
            x, height = x + size["w"], max(height, size["h"])
        y += height
    return placed
