"""The chart says the same as the kustomize base, object by object, and its values are checked."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from shardlane import __version__
from tests.deploy.renderings import CHART, STORE, Object, containers, helm, of_kind, rendering
from tests.deploy.test_kubernetes import OLDEST

OF_HELM = {"app.kubernetes.io/managed-by", "helm.sh/chart"}


def plain(each: Object) -> Object:
    """Without what only one of the two can say: helm's labels, the namespace, a config's hash in a name or in an annotation."""
    metadata = each["metadata"]
    metadata.pop("namespace")
    metadata["labels"] = {name: value for name, value in metadata.get("labels", {}).items() if name not in OF_HELM}
    text = re.sub(r"shardlane-config-\w{10}\b", "shardlane-config", json.dumps(each))
    found: Object = json.loads(text)
    for subject in found.get("subjects", ()):
        subject.pop("namespace")
    if "config.toml" in found.get("data", {}):
        found["data"]["config.toml"] = tomllib.loads(found["data"]["config.toml"])
    if found["kind"] in ("StatefulSet", "Job"):
        template = found["spec"]["template"]
        template["metadata"].get("annotations", {}).pop("checksum/config", None)
        template["spec"].get("volumes", []).sort(key=lambda volume: str(volume["name"]))
        for container in containers(template["spec"]):
            container.get("env", []).sort(key=lambda variable: str(variable["name"]))
    return found


def by_name(name: str) -> dict[tuple[str, str], Object]:
    found = [plain(each) for each in json.loads(json.dumps(rendering(name))) if each["kind"] != "Namespace"]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def test_it_renders_to_the_base() -> None:
    base, chart = by_name("base"), by_name("chart")
    assert chart.keys() == base.keys() and len(base) == 27
    for key, each in base.items():
        assert chart[key] == each, key


def test_with_object_storage_it_renders_to_the_component() -> None:
    component, chart = by_name(STORE), by_name(f"chart, {STORE}")
    assert component.keys() == chart.keys() == by_name("base").keys() - {
        ("PersistentVolumeClaim", "shardlane-shared")
    } | {("NetworkPolicy", "shardlane-object-storage")}  # fmt: skip
    for key, each in component.items():
        assert chart[key] == each, key


def test_with_cert_manager_it_renders_to_the_component() -> None:
    component, chart = (
        {
            f"{each['kind']}/{each['metadata']['name']}": each.get("spec") or each.get("rules")
            for each in of_kind(rendering(name), "Issuer", "Certificate", "Secret", "Role")
        }
        for name in ("components", "chart, all of it")
    )
    assert json.loads(json.dumps(chart).replace("llama-", "shardlane-")) == component and len(component) == 9


def test_where_the_store_is_can_be_said() -> None:
    """Variables for every process, whose Secret may be missing: a machine has an identity of its own, perhaps."""
    name, config = "AWS_ENDPOINT_URL", '[data]\npath = "s3://bucket/data"\n[checkpoint]\npath = "s3://bucket/run"\n'
    store = {
        "enabled": True,
        "environment": {name: "http://minio:9000"},
        "egress": {"ports": [9000], "to": [{"podSelector": {}}]},
    }
    rendered = helm("chart.render(values)", {"config": config, "objectStorage": store})
    objects = tuple(each for text in rendered.values() for each in yaml.safe_load_all(text) if each)
    found = [container for each in of_kind(objects, "StatefulSet") for container in containers(each["spec"]["template"]["spec"])]
    assert len(found) == 4 and not any("envFrom" in container for container in found)
    assert all({"name": name, "value": "http://minio:9000"} in container["env"] for container in found)
    [policy] = [each for each in of_kind(objects, "NetworkPolicy") if each["metadata"]["name"].endswith("object-storage")]
    assert policy["spec"]["egress"] == [{"ports": [{"port": 9000}], "to": [{"podSelector": {}}]}]


def test_lint_finds_nothing_but_that_there_is_no_icon() -> None:
    report = helm(f"helm.lint({str(CHART)!r}, values, strict=True)")
    assert report["errors"] == [] and [each["error"] for each in report["messages"]] == ["icon is recommended"]


def test_it_is_of_the_code_s_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == chart["version"] == __version__
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"workers": 4}, "workers"),
        ({"cluster": {"stages": 0}}, "/cluster/stages"),
        ({"cluster": {"stages": 2.5}}, "/cluster/stages"),
        ({"certificates": "none"}, "/certificates"),
        ({"storage": {"shared": {"size": "20 GB"}}}, "/storage/shared/size"),
        ({"worker": {"gpu": 1}}, "gpu"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"objectStorage": {"egress": {"ports": []}}}, "/objectStorage/egress/ports"),
        ({"objectStorage": {"environment": {"SHARDLANE_INSECURE": "1"}}}, "'SHARDLANE_INSECURE' does not match pattern"),
        ({"objectStorage": {"enabled": True}}, "config has a path below /shared"),
        (
            {"config": '[cluster]\nstages = 3\n[model]\npreset = "demo"\n'},
            "config has a [cluster], which the value `cluster` says",
        ),
    ],
)
def test_wrong_values_are_refused(values: Object, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"Error") as caught:
        helm("chart.validate_schema(values) or chart.render(values)", values)
    assert complaint in str(caught.value)


def test_a_changed_config_restarts_the_coordinator() -> None:
    def checksum(values: Object) -> str:
        text = helm("chart.render(values, name=release)", values)["shardlane/templates/coordinator.yaml"]
        [found] = re.findall(r"checksum/config: (\w{64})", text)
        return str(found)

    assert checksum({}) == checksum({"spareWorkers": 2}) != checksum({"cluster": {"stages": 3}})


def test_every_value_is_in_the_schema_and_used() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert schema["properties"].keys() - {"global"} == values.keys()
    templates = "".join(file.read_text(encoding="utf-8") for file in (Path(CHART) / "templates").iterdir())
    assert all(f".Values.{name}" in templates for name in values)
