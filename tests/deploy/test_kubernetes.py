"""What goes to Kubernetes, by kustomize and by helm, is valid, admitted, and starts what the code has."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from shardlane import __version__
from shardlane import config as configs
from shardlane.certificates import JOIN_SECRET
from shardlane.tls import ROLES, name_of
from tests.deploy import restricted
from tests.deploy.renderings import (
    COMPONENT,
    MEMBERS,
    RENDERINGS,
    STORE_SECRET,
    Object,
    containers,
    environment_of,
    members,
    of_kind,
    pod_templates,
    rendering,
    selects,
)
from tests.deploy.test_manifests import GRPC_PORT, METRICS_PORT, USER, check_serving, image_environment, parse

validating = pytest.importorskip("kubernetes_validate.utils", reason="kubernetes-validate is not installed")
SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = sorted({validating.major_minor(each) for each in validating.all_versions()}, key=lambda text: int(text.split(".")[1]))
OLDEST = "1.29"  # as the chart and docs/kubernetes.md say
STOP_SECONDS = 10  # what a service does after it has drained: reports are flushed, calls end
FILES = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "tls.crt", "--ssl-keyfile": "tls.key"}
ANNOTATION_BYTES_MAX = 256 << 10  # `kubectl apply` keeps the object in one


@pytest.fixture(scope="module", params=RENDERINGS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return rendering(request.param)


@pytest.fixture(scope="module", autouse=True)
def read_schemas_once() -> Any:
    """The validator reads megabytes of definitions for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validating, "schema_contents", functools.cache(validating.schema_contents))
        yield


def validate(each: Object, version: str) -> None:
    own = SCHEMAS / f"{each['kind'].lower()}.json"
    if own.exists():
        jsonschema.Draft202012Validator(json.loads(own.read_text(encoding="utf-8"))).validate(each)
    else:
        validating.validate(each, version, strict=True)


@pytest.mark.parametrize("version", [VERSIONS[-1], VERSIONS[-3], OLDEST])
def test_every_object_is_what_its_schema_says(objects: tuple[Object, ...], version: str) -> None:
    for each in objects:
        validate(each, version)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("StatefulSet", lambda spec: spec.update(replica=3)),
        ("StatefulSet", lambda spec: spec["template"]["spec"]["containers"][0].update(imagePulPolicy="Always")),
        ("NetworkPolicy", lambda spec: spec.update(egress={})),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(interval="5 s")),
        ("Certificate", lambda spec: spec.update(usages=["server"])),
        ("Certificate", lambda spec: spec.pop("issuerRef")),
        ("Issuer", lambda spec: spec.update(acme={})),
    ],
)
def test_what_no_schema_allows_is_found(kind: str, spoil: Callable[[Object], Any]) -> None:
    for each in of_kind(rendering("chart, all of it"), kind)[:1]:
        spoilt = json.loads(json.dumps(each))
        spoil(spoilt["spec"])
        with pytest.raises(jsonschema.ValidationError):
            validate(spoilt, VERSIONS[-1])
        return
    pytest.fail(f"there is no {kind}")


# ---- admission ----------------------------------------------------------------------------------------------------------


def test_pods_are_admitted_by_the_restricted_profile(objects: tuple[Object, ...]) -> None:
    found = {name: restricted.faults(pod["spec"], pod["metadata"].get("annotations", {})) for name, pod in pod_templates(objects)}
    assert len(found) >= len(MEMBERS) and not any(found.values()), found


@pytest.mark.parametrize(
    ("fault", "spoil"),
    [
        ("hostNetwork", lambda pod: pod.update(hostNetwork=True)),
        ("volume host", lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
        ("shard: runAsNonRoot", lambda pod: pod["securityContext"].pop("runAsNonRoot")),
        ("shard: runAsUser", lambda pod: pod["containers"][0]["securityContext"].update(runAsUser=0)),
        ("shard: seccompProfile", lambda pod: pod["securityContext"].update(seccompProfile={"type": "Unconfined"})),
        ("shard: drop ALL", lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(drop=["NET_RAW"])),
        ("shard: capabilities", lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_PTRACE"])),
        ("shard: privileged", lambda pod: pod["containers"][0]["securityContext"].update(privileged=True)),
        ("shard: allowPrivilegeEscalation", lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation")),
        ("shard: hostPort", lambda pod: pod["containers"][0]["ports"][0].update(hostPort=7070)),
        ("shard: procMount", lambda pod: pod["containers"][0]["securityContext"].update(procMount="Unmasked")),
    ],
)
def test_what_the_restricted_profile_refuses_is_found(fault: str, spoil: Callable[[Object], Any]) -> None:
    pod = json.loads(json.dumps(members(rendering("chart"))["shard"]["spec"]["template"]["spec"]))
    assert restricted.faults(pod, {}) == []
    spoil(pod)
    assert restricted.faults(pod, {}) == [fault]


def test_pods_are_hardened_and_bounded(objects: tuple[Object, ...]) -> None:
    for name, template in pod_templates(objects):
        pod = template["spec"]
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == USER
        assert pod["enableServiceLinks"] is False  # they would set variables that begin with SHARDLANE_
        assert pod["automountServiceAccountToken"] is name.endswith("-certificates")
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_only_the_namespace_of_the_run_is_touched(objects: tuple[Object, ...]) -> None:
    """And nothing outside of namespaces, which takes rights that few have, but for the namespace itself."""
    [namespace] = {each["metadata"]["namespace"] for each in objects if each["kind"] != "Namespace"}
    for each in of_kind(objects, "Namespace"):
        assert each["metadata"]["name"] == namespace
        assert each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for binding in of_kind(objects, "RoleBinding"):
        assert [subject["namespace"] for subject in binding["subjects"]] == [namespace]
    assert not of_kind(objects, "ClusterRole", "ClusterRoleBinding", "PriorityClass", "StorageClass")


# ---- what runs ----------------------------------------------------------------------------------------------------------


def test_services_start_as_the_code_wants_it(objects: tuple[Object, ...], repository: Path) -> None:
    """Mutual TLS, with the files of a mount that waits until all three are there."""
    assert members(objects).keys() == set(MEMBERS)
    for role, workload in members(objects).items():
        template = workload["spec"]["template"]
        [container], pod = template["spec"]["containers"], template["spec"]
        flags = parse(container["args"], image_environment(repository) | environment_of(container, "pod-0"))
        check_serving(flags)
        assert not flags.insecure
        certs = next(each["mountPath"] for each in container["volumeMounts"] if each["name"] == "certs")
        said = {flag: getattr(flags, flag.removeprefix("--").replace("-", "_")) for flag in FILES}
        assert said == {flag: f"{certs}/{file}" for flag, file in FILES.items()}
        [secret] = [each["secret"] for each in pod["volumes"] if each["name"] == "certs"]
        assert secret["secretName"].endswith(f"-{role}-tls") and secret["defaultMode"] == 0o440
        assert [(each["key"], each["path"]) for each in secret["items"]] == [(file, file) for file in FILES.values()]
        [join] = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "join"]
        [secret] = [each["secret"] for each in pod["volumes"] if each["name"] == "join"]
        assert flags.join_secret_file == f"{join}/{JOIN_SECRET}" and secret["secretName"].endswith("-join")
        assert secret["items"] == [{"key": JOIN_SECRET, "path": JOIN_SECRET}] and secret["defaultMode"] == 0o440
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
            "grpc": GRPC_PORT,
            "metrics": METRICS_PORT,
        }
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert pod["terminationGracePeriodSeconds"] >= flags.drain_seconds + STOP_SECONDS


def test_addresses_are_names_that_services_give(objects: tuple[Object, ...]) -> None:
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Service")}
    [coordinator] = [each for each in services if each.endswith("-coordinator")]
    for role, workload in members(objects).items():
        [container], name = workload["spec"]["template"]["spec"]["containers"], workload["spec"]["serviceName"]
        environment = environment_of(container, "pod-0")
        assert environment["SHARDLANE_ADVERTISE"] == (f"{name}:{GRPC_PORT}" if role == "coordinator" else f"pod-0.{name}")
        assert environment.get("SHARDLANE_COORDINATOR", f"{coordinator}:{GRPC_PORT}") == f"{coordinator}:{GRPC_PORT}"
        service = services[name]
        assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"] is True
        assert {port["name"]: port["port"] for port in service["ports"]} == {"grpc": GRPC_PORT, "metrics": METRICS_PORT}
        assert selects({"matchLabels": service["selector"]}, workload["spec"]["template"]["metadata"]["labels"])


def test_all_run_one_image_of_this_version(objects: tuple[Object, ...]) -> None:
    found = {(each["image"], each["imagePullPolicy"]) for _, pod in pod_templates(objects) for each in containers(pod["spec"])}
    [(image, policy)] = found
    name, _, tag = image.rpartition(":")
    assert name.endswith("shardlane") and tag.removesuffix("-cuda") == __version__ and policy == "IfNotPresent"
    devices = [container for _, pod in pod_templates(objects) for container in containers(pod["spec"]) if uses_gpu(container)]
    assert [container["name"] for container in devices] == (["worker"] if tag.endswith("-cuda") else [])


def uses_gpu(container: Object) -> bool:
    has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
    assert has_gpu == (container["args"][-2:] == ["--device", "cuda"])
    return has_gpu


def test_as_many_start_as_the_config_places(objects: tuple[Object, ...], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    [config_map] = [each for each in of_kind(objects, "ConfigMap") if "config.toml" in each["data"]]
    (tmp_path / "config.toml").write_text(config_map["data"]["config.toml"])
    config = configs.load(tmp_path / "config.toml")
    wanted = {
        "coordinator": 1,
        "shard": config.cluster.shards,
        "worker": config.cluster.stages * config.cluster.replicas,
    }
    if "chart, all of it" in request.node.callspec.params.values():
        wanted["worker"] += 1  # a spare
        assert config.cluster.replicas_max == 3
    assert {role: workload["spec"]["replicas"] for role, workload in members(objects).items()} == wanted
    has_store = not of_kind(objects, "PersistentVolumeClaim")
    place = "s3://bucket/" if has_store else "/shared/"
    assert config.data.path.startswith(place) and config.checkpoint.path.startswith(place)
    pod = members(objects)["coordinator"]["spec"]["template"]["spec"]
    prepare, coordinator = pod["initContainers"][0]["args"], pod["containers"][0]["args"]
    assert prepare == ["shardlane.cli", "prepare", coordinator[2], "--run-dir", coordinator[4]]


def test_references_hold(objects: tuple[Object, ...], request: pytest.FixtureRequest) -> None:
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    names |= {("Secret", each["spec"]["secretName"]) for each in of_kind(objects, "Certificate")}
    if "chart, least of it" in request.node.callspec.params.values():
        names |= {("Secret", f"r-{role}-tls") for role in MEMBERS} | {("Secret", "r-join")}  # certificates: existing
    for name, template in pod_templates(objects):
        pod = template["spec"]
        templates = [each for role in members(objects).values() for each in role["spec"].get("volumeClaimTemplates", ())]
        volumes = {each["name"] for each in [*pod.get("volumes", ()), *(each["metadata"] for each in templates)]}
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
            given = [each["secretRef"]["name"] for each in container.get("envFrom", ())]
            is_in_store = name.startswith("StatefulSet") and not of_kind(objects, "PersistentVolumeClaim")
            assert given == ([STORE_SECRET] if is_in_store else [])
        for volume in pod.get("volumes", ()):
            wanted = {
                ("Secret", volume.get("secret", {}).get("secretName")),
                ("ConfigMap", volume.get("configMap", {}).get("name")),
                ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
            }
            assert {each for each in wanted if each[1]} <= names, name
        assert pod.get("serviceAccountName") is None or ("ServiceAccount", pod["serviceAccountName"]) in names
    for each in of_kind(objects, "StatefulSet"):
        assert selects(each["spec"]["selector"], each["spec"]["template"]["metadata"]["labels"])
    for each in of_kind(objects, "Certificate"):
        assert ("Issuer", each["spec"]["issuerRef"]["name"]) in names


# ---- certificates -------------------------------------------------------------------------------------------------------


def test_the_job_may_fill_the_secrets_that_are_there_and_no_others(objects: tuple[Object, ...]) -> None:
    jobs = [pod for name, pod in pod_templates(objects) if name.endswith("-certificates")]
    secrets = {each["metadata"]["name"] for each in of_kind(objects, "Secret")}
    if not jobs:
        assert not secrets and not of_kind(objects, "Role", "RoleBinding", "ServiceAccount")
        return
    module, command, flag, prefix, *only = jobs[0]["spec"]["containers"][0]["args"]
    assert (module, command, flag) == ("shardlane.cli", "certs", "--kubernetes-secrets")
    filled = [f"{prefix}-join"]
    if of_kind(objects, "Certificate"):
        assert len(jobs) == 1 and only == ["--join-secret-only"], "the rest is cert-manager's"
    else:
        assert len(jobs) == 2 and jobs[0] == jobs[1] and not only, "the Job and the CronJob do the same"
        filled = [f"{prefix}-authority", *(f"{prefix}-{role}-tls" for role in ROLES), *filled]
    assert secrets == set(filled) and all("data" not in each for each in of_kind(objects, "Secret"))
    [role] = of_kind(objects, "Role")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": filled, "verbs": ["get", "patch"]}]
    [binding] = of_kind(objects, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == jobs[0]["spec"]["serviceAccountName"]


@pytest.mark.parametrize("name", ["components", "chart, all of it"])
def test_cert_manager_makes_what_the_job_would(name: str) -> None:
    objects = rendering(name)
    certificates = {each["metadata"]["name"].rpartition("-")[2]: each["spec"] for each in of_kind(objects, "Certificate")}
    assert certificates.keys() == {"authority", *ROLES}
    for role in ROLES:
        spec = certificates[role]
        assert spec["dnsNames"] == [name_of(role)] and {"server auth", "client auth"} <= set(spec["usages"])
        assert spec["secretName"].endswith(f"-{role}-tls")
    [issuer] = [each for each in of_kind(objects, "Issuer") if "ca" in each["spec"]]
    assert issuer["spec"]["ca"]["secretName"] == certificates["authority"]["secretName"]
    assert not of_kind(objects, "CronJob")


# ---- monitoring ---------------------------------------------------------------------------------------------------------


def test_every_member_is_scraped_under_the_job_that_the_dashboards_know(objects: tuple[Object, ...]) -> None:
    for monitor in of_kind(objects, "PodMonitor"):
        assert monitor["spec"]["jobLabel"] == COMPONENT
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics" and [each["targetLabel"] for each in endpoint["relabelings"]] == ["run"]
        scraped = {
            pod["metadata"]["labels"][COMPONENT]
            for _, pod in pod_templates(objects)
            if selects(monitor["spec"]["selector"], pod["metadata"]["labels"])
        }
        assert scraped == set(MEMBERS)


def test_monitoring_brings_every_dashboard_and_rule(repository: Path) -> None:
    objects = rendering("overlays/monitoring")
    [dashboards] = [each for each in of_kind(objects, "ConfigMap") if each["metadata"].get("labels", {}).get("grafana_dashboard")]
    files = {file.name: file.read_text(encoding="utf-8") for file in (repository / "deploy/grafana/dashboards").glob("*.json")}
    assert dashboards["data"] == files
    assert len(json.dumps(dashboards)) < ANNOTATION_BYTES_MAX
    assert len(of_kind(objects, "PodMonitor")) == 1
    files_of_rules = sorted((repository / "deploy/prometheus").glob("rules/*.yml"))
    groups = [group for file in files_of_rules for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    found = [group for each in of_kind(objects, "PrometheusRule") for group in each["spec"]["groups"]]
    assert found == groups, "python deploy/k8s/prometheus_rule.py writes it anew"


def test_the_disruption_budget_is_of_shards(objects: tuple[Object, ...]) -> None:
    [budget] = of_kind(objects, "PodDisruptionBudget")
    labels = [pod["metadata"]["labels"] for _, pod in pod_templates(objects)]
    assert {each[COMPONENT] for each in labels if selects(budget["spec"]["selector"], each)} == {"shard"}
    assert budget["spec"]["maxUnavailable"] == 1


def test_pods_share_a_node_where_their_volume_does(objects: tuple[Object, ...]) -> None:
    claims = of_kind(objects, "PersistentVolumeClaim")
    assert len(claims) <= 1
    is_shared = all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in claims)  # or is in a bucket
    labels = {role: each["spec"]["template"]["metadata"]["labels"] for role, each in members(objects).items()}
    for role, workload in members(objects).items():
        affinity = workload["spec"]["template"]["spec"].get("affinity", {})
        terms = affinity.get("podAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", [])
        assert len(terms) == (0 if is_shared else 1)
        assert all(selects(term["labelSelector"], each) for term in terms for each in labels.values())
        if role == "shard":
            [term] = affinity["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
            matched = [each for each in labels if selects(term["podAffinityTerm"]["labelSelector"], labels[each])]
            assert matched == ["shard"]


def test_every_file_is_used(repository: Path) -> None:
    """A manifest that no kustomization lists is one that nobody applies."""
    for kustomization in (repository / "deploy/k8s").rglob("kustomization.yaml"):
        text = kustomization.read_text(encoding="utf-8")
        others = {file.name for file in kustomization.parent.iterdir()} - {"kustomization.yaml"}
        assert all(name in text for name in others), kustomization


def test_the_base_and_the_chart_have_one_config(repository: Path) -> None:
    written = tomllib.loads((repository / "deploy/k8s/base/config.toml").read_text(encoding="utf-8"))
    [config_map] = of_kind(rendering("chart"), "ConfigMap")
    assert tomllib.loads(config_map["data"]["config.toml"]) == written
