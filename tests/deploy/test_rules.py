"""Recording and alert rules: what they ask for is exported, each alert has a test and a runbook entry, promtool agrees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from tests.deploy.exported import OF_PROMETHEUS, exported, faults_of, metrics_in, services
from tests.deploy.promtool import promtool
from tests.deploy.test_dashboards import expressions, recorded

SEVERITIES = {"critical", "warning"}


def folder(repository: Path) -> Path:
    return repository / "deploy/prometheus"


def rules(repository: Path) -> list[dict[str, Any]]:
    text = (folder(repository) / "rules/shardlane.yml").read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def alerts(repository: Path) -> dict[str, dict[str, Any]]:
    found = [rule for rule in rules(repository) if "alert" in rule]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


def runbook(repository: Path) -> dict[str, str]:
    """Entries by their heading, of the second level."""
    text = (repository / "docs/runbook.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_metric_and_label_is_exported(repository: Path) -> None:
    known = exported() | recorded(repository) | {"up": OF_PROMETHEUS}
    assert [fault for rule in rules(repository) for fault in faults_of(rule["expr"], known)] == []


def test_recorded_names_say_level_metric_and_operations(repository: Path) -> None:
    for rule in rules(repository):
        if "record" in rule:
            level, metric, operations = rule["record"].split(":")
            assert metric.startswith("shardlane_") and re.search(r"\d+[mh]$", operations)
            for labels in re.findall(r"^(?:sum|max) by \(([^)]*)\)", rule["expr"]):
                assert level == labels.replace(", ", "_")


def test_what_is_recorded_is_used(repository: Path) -> None:
    used = set().union(*map(metrics_in, [rule["expr"] for rule in rules(repository)] + expressions(repository)))
    assert recorded(repository).keys() <= used


def test_every_alert_says_what_is_wrong_and_where_help_is(repository: Path) -> None:
    for name, rule in alerts(repository).items():
        assert re.fullmatch(r"Shardlane([A-Z][a-z]+)+", name) and rule["labels"]["severity"] in SEVERITIES
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_every_alert_has_a_runbook_entry_and_every_entry_an_alert(repository: Path) -> None:
    entries, known = runbook(repository), alerts(repository)
    assert list(entries) == list(known)  # in the same order
    for name, text in entries.items():
        assert f"*{known[name]['labels']['severity']}*" in text, name
        assert all(f"**{part}**" in text for part in ("Means", "Look at", "Do")), name


def test_the_documents_name_metrics_that_are_exported(repository: Path) -> None:
    """The rest that they name is looked for in tests/test_docs.py."""
    known = exported()
    text = "".join(file.read_text(encoding="utf-8") for file in (repository / "docs").glob("*.md"))
    assert set(re.findall(r"`(shardlane_\w+)", text)) <= {
        *known, *(re.sub(r"_(bucket|sum|count)$", "", name) for name in known)
    }  # fmt: skip


def test_every_alert_is_tested_to_fire_and_not_to(repository: Path) -> None:
    fires, rests = set(), set()
    for file in (folder(repository) / "rules/tests").glob("*.yml"):
        for test in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]:
            for case in test.get("alert_rule_test", ()):
                (fires if case.get("exp_alerts") else rests).add(case["alertname"])
            for case in test.get("promql_expr_test", ()):
                for name in re.findall(r'ALERTS\{alertname="(\w+)", alertstate="firing"', case["expr"]):
                    (fires if case["exp_samples"] else rests).add(name)
    assert fires == rests == alerts(repository).keys()


def test_promtool_checks_configuration_and_rules(repository: Path) -> None:
    said = promtool("check", "config", "prometheus.yml", folder=folder(repository))
    assert f"{len(rules(repository))} rules found" in said
    promtool("check", "rules", "rules/shardlane.yml", folder=folder(repository))


def test_promtool_tests_the_rules(repository: Path) -> None:
    tests = sorted(str(each.relative_to(folder(repository))) for each in (folder(repository) / "rules/tests").glob("*.yml"))
    assert promtool("test", "rules", *tests, folder=folder(repository)).count("SUCCESS") == len(tests)


def test_promtool_reads_every_expression_of_the_dashboards(repository: Path, tmp_path: Path) -> None:
    found = [each.replace("$__rate_interval", "1m").replace("$run", ".*") for each in expressions(repository)]
    made = [{"record": f"a:panel:{index}", "expr": each} for index, each in enumerate(found)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    tmp_path.chmod(0o755)
    assert f"{len(made)} rules found" in promtool("check", "rules", "panels.yml", folder=tmp_path)


@pytest.mark.parametrize("service", ["coordinator", "shard", "worker"])
def test_promtool_finds_no_fault_in_names_and_types(service: str, tmp_path: Path) -> None:
    promtool("check", "metrics", folder=tmp_path, stdin=generate_latest(services()[service].registry).decode())
