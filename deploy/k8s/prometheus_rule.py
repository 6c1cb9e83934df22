"""Writes deploy/prometheus/rules/*.yml anew as the PrometheusRule of components/monitoring: python deploy/k8s/prometheus_rule.py

A test says whether it is fresh. JSON, which kustomize takes as well: nobody writes it by hand.
"""

import json
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
FILE = HERE / "components/monitoring/prometheus-rule.json"


def main() -> None:
    files = sorted((HERE.parent / "prometheus/rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "shardlane"},
        "spec": {"groups": groups},
    }
    FILE.write_text(json.dumps(rule, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
