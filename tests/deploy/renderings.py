"""Everything that `deploy/k8s` and the chart render to, by name, and how to look things up in it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KUSTOMIZE = REPOSITORY / "deploy/k8s"
CHART = REPOSITORY / "deploy/helm/shardlane"
COMPONENT = "app.kubernetes.io/component"
MEMBERS = ("coordinator", "shard", "worker")
Object = dict[str, Any]

ALL_COMPONENTS = ["cert-manager", "gpu", "many-nodes", "monitoring"]
STORE = "object-storage"  # apart from them: it takes away what many-nodes changes, and wants another config
STORE_SECRET = "shardlane-object-storage"  # of the store's credentials, which is there before
IN_BUCKET = {'"/shared/data"': '"s3://bucket/data"', '"/shared/checkpoints"': '"s3://bucket/checkpoints"'}


def in_bucket(config: str) -> str:
    for path, uri in IN_BUCKET.items():
        assert config.count(path) == 1
        config = config.replace(path, uri)
    return config


# By name: the folder that is rendered, or the components that stand on the base in a namespace of another name.
KUSTOMIZATIONS: dict[str, str | list[str]] = {
    "base": "base",
    **{f"overlays/{name}": f"overlays/{name}" for name in ("local", "gpu", "monitoring")},
    "components": ALL_COMPONENTS,
    STORE: [STORE],
}
# By name: the release, and its values.
RELEASES: dict[str, tuple[str, Object]] = {
    "chart": ("shardlane", {}),
    "chart, all of it": (
        "llama",
        {
            "certificates": "cert-manager",
            "cluster": {"stages": 4, "replicas": 2, "shards": 3, "replicasMax": 3},
            "spareWorkers": 1,
            "image": {"repository": "registry.example/shardlane", "tag": "0.1.0-cuda", "pullSecrets": ["registry"]},
            "storage": {"shared": {"manyNodes": True, "className": "nfs"}, "run": {"className": "ssd"}},
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "shard": {"drainSeconds": 120, "nodeSelector": {"disk": "fast"}},
            "worker": {"gpus": 1, "tolerations": [{"key": "spot", "operator": "Exists"}]},
        },
    ),
    f"chart, {STORE}": (
        "shardlane",
        {
            "config": in_bucket(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["config"]),
            "objectStorage": {"enabled": True, "secret": STORE_SECRET},
        },
    ),
    "chart, least of it": ("r", {"certificates": "existing", "networkPolicy": {"enabled": False}}),
}
RENDERINGS = [*KUSTOMIZATIONS, *RELEASES]


@functools.cache
def rendering(name: str) -> tuple[Object, ...]:
    """Skips where what renders it is not there."""
    return tuple(_release(*RELEASES[name]) if name in RELEASES else _kustomization(KUSTOMIZATIONS[name]))


def _kustomization(what: str | list[str]) -> list[Object]:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(command[0]) is None:
        pytest.skip("there is neither kustomize nor kubectl")
    if isinstance(what, str):
        return _run([*command, str(KUSTOMIZE / what)])
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.relpath(KUSTOMIZE, Path(folder).resolve())
        written: Object = {"resources": [f"{here}/base"], "components": [f"{here}/components/{each}" for each in what]}
        if STORE in what:
            config = (KUSTOMIZE / "base/config.toml").read_text(encoding="utf-8")
            (Path(folder) / "config.toml").write_text(in_bucket(config), encoding="utf-8")
            merged = {"name": "shardlane-config", "behavior": "merge", "files": ["config.toml"]}
            written |= {"configMapGenerator": [merged]}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump({**written, "namespace": "elsewhere"}))
        return _run([*command, folder])


def _run(command: list[str]) -> list[Object]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


def _release(release: str, values: Object) -> list[Object]:
    manifests = helm("chart.render(values, name=release, namespace='training')", values, release)
    return [each for text in manifests.values() for each in yaml.safe_load_all(text) if each]


def helm(expression: str, values: Mapping[str, Any] | None = None, release: str = "shardlane") -> Any:
    """What helm's library says. In a process of its own, for it brings a Go runtime. Raises `ValueError` with its complaint."""
    pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    code = f"""
import json, sys
from helm_python import chart as helm
values, release = json.load(sys.stdin)
chart = helm.Chart.load({str(CHART)!r})
print(json.dumps({expression}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([values or {}, release]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def pod_templates(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """(kind/name, the template) of all that makes pods."""
    for each in of_kind(objects, "StatefulSet", "Deployment", "Job", "CronJob"):
        spec = each["spec"]["jobTemplate"]["spec"] if each["kind"] == "CronJob" else each["spec"]
        yield f"{each['kind']}/{each['metadata']['name']}", spec["template"]


def members(objects: tuple[Object, ...]) -> dict[str, Object]:
    """The StatefulSets, by component."""
    return {each["spec"]["template"]["metadata"]["labels"][COMPONENT]: each for each in of_kind(objects, "StatefulSet")}


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def environment_of(container: Object, pod_name: str) -> dict[str, str]:
    """As the kubelet sets it, where POD_NAME is the only thing that it fills in."""
    found = {each["name"]: each.get("value", pod_name) for each in container.get("env", ())}
    return {name: value.replace("$(POD_NAME)", pod_name) for name, value in found.items()}


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Of a label selector with equalities and `In`, which is what is used here."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )
