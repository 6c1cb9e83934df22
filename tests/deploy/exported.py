"""What the services export, and what an expression of PromQL asks for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

from coordinator.door import Door
from coordinator.instruments import Instruments
from ps_service.instruments import ShardInstruments
from shardlane.metrics import Metrics
from shardlane.top_k import Residuals
from worker_service.instruments import WorkerInstruments

# What a scrape adds (`run` by prometheus.yml), and buckets of histograms have.
OF_PROMETHEUS = {"job", "instance", "run", "le"}
WORDS = {"by", "ignoring", "group_left", "on", "without", "offset", "bool", "and", "or", "unless", "Inf"}
_MATCHING = r"\b(?:by|ignoring|on|without|group_left) \(([^)]*)\)"


def services() -> dict[str, Metrics]:
    """The instruments of each service, with one series at least of each."""
    shard, worker, coordinator = Metrics("shard"), Metrics("worker"), Metrics("coordinator")
    ShardInstruments(shard).watch(MagicMock(num_outbox_bytes=0, plan=None))
    of_worker = WorkerInstruments(worker)
    of_worker.watch(lambda: 0.0, lambda: 0.0, lambda: 0.0, Residuals())
    of_worker.sit((0, 0))
    Instruments(coordinator, MagicMock(), lambda: 0.0)
    with tempfile.TemporaryDirectory() as folder:
        (secret := Path(folder) / "join.secret").write_text("0" * 64)
        Door(secret, (), coordinator)
    for metrics in (shard, worker, coordinator):
        metrics.observer("unary_unary", "service", "Method", lambda request, context: request)
        metrics.watch_certificate(lambda: 0.0)
    return {"shard": shard, "worker": worker, "coordinator": coordinator}


def exported() -> dict[str, set[str]]:
    """Label names by metric, of all services: histograms by their three series, counters with their `_total`."""
    found: dict[str, set[str]] = {}
    for metrics in services().values():
        for family in metrics.registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            labels = {label for sample in family.samples for label in sample.labels}
            for suffix in suffixes:
                found.setdefault(family.name + suffix, set()).update(labels)
    return found


def metrics_in(expression: str) -> set[str]:
    bare = re.sub(rf"\"[^\"]*\"|\{{[^}}]*\}}|\[[^\]]*\]|{_MATCHING}", " ", expression)
    return set(re.findall(r"(?<![\w:])[a-z_][\w:]*\b(?!\s*\()", bare, re.IGNORECASE)) - WORDS


def labels_in(expression: str) -> Iterator[str]:
    for inside in re.findall(r"\{([^}]*)\}", expression):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)
    for inside in re.findall(_MATCHING, expression):
        yield from re.findall(r"\w+", inside)


def faults_of(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What the expression asks for and nobody exports."""
    names = metrics_in(expression)
    if not names:
        return [f"no metric in {expression}"]
    if unknown := names - known.keys():
        return [f"{', '.join(sorted(unknown))} in {expression}"]
    labels = OF_PROMETHEUS.union(*(known[name] for name in names))
    return [f"label {each} in {expression}" for each in sorted(set(labels_in(expression)) - labels)]
