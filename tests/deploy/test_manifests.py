"""docker-compose.yml and the kustomize base start what the code has: commands that parse, ports, users, numbers of processes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardlane import config as configs

GRPC_PORT, METRICS_PORT, USER = 7070, 9100, 10001
SERVICES = ("coordinator", "ps_service", "worker_service")
REQUIRED = {"coordinator": ("--config", "--run-dir")}


def parse(arguments: list[str], environment: Mapping[str, str]) -> Any:
    """What a service's own parser makes of a container's arguments; it exits, and so fails, on a flag that it does not know."""
    service, *flags = arguments
    assert service in SERVICES
    made = importlib.import_module(f"{service}.__main__").parser(environment)
    return made.parse(flags, required=REQUIRED.get(service, ("--coordinator",)))


def image_environment(repository: Path) -> dict[str, str]:
    text = (repository / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
    return dict(re.findall(r"(SHARDLANE_\w+)=(\S+)", text))


def check_serving(flags: Any) -> None:
    assert flags.bind == f"0.0.0.0:{GRPC_PORT}" and flags.metrics_bind == f"0.0.0.0:{METRICS_PORT}"
    assert flags.stay


# ---- Compose ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose(repository: Path) -> dict[str, Any]:
    """With every ${NAME:-default} at its default."""
    text = (repository / "docker-compose.yml").read_text(encoding="utf-8")
    read: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return read


def strings(environment: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in environment.items()}


def test_compose_is_for_old_and_new_releases(compose: dict[str, Any]) -> None:
    """Compose v1.29 refuses a top-level name, and `develop`."""
    assert {key for key in compose if not key.startswith("x-")} == {"services", "volumes"}
    assert all("develop" not in service for service in compose["services"].values())


@pytest.mark.parametrize("name", ["coordinator", "shard", "worker"])
def test_compose_services_parse(compose: dict[str, Any], repository: Path, name: str) -> None:
    service = compose["services"][name]
    flags = parse(service["command"], image_environment(repository) | strings(service["environment"]))
    check_serving(flags)
    files = (flags.ssl_ca_certfile, flags.ssl_certfile, flags.ssl_keyfile)
    assert files == ("/certs/ca.pem", f"/certs/{name}.pem", f"/certs/{name}.key") and not flags.insecure
    assert "certs:/certs:ro" in service["volumes"]
    assert service["restart"] == "unless-stopped"
    address = f"coordinator:{GRPC_PORT}"
    assert (flags.advertise if name == "coordinator" else flags.coordinator) == address


def test_compose_prepares_what_the_coordinator_serves(compose: dict[str, Any], repository: Path) -> None:
    prepare, coordinator = compose["services"]["prepare"], compose["services"]["coordinator"]
    module, command, config, flag, run_dir = prepare["command"]
    flags = parse(coordinator["command"], strings(coordinator["environment"]))
    assert (module, command, flag) == ("shardlane.cli", "prepare", "--run-dir")
    assert (config, run_dir) == (flags.config, flags.run_dir)
    completed = {"condition": "service_completed_successfully"}
    assert coordinator["depends_on"] == {"certs": completed}
    assert compose["services"]["certs"]["depends_on"] == {"prepare": completed}
    assert (repository / config).is_file()


def test_compose_starts_as_many_as_its_config_places(compose: dict[str, Any], repository: Path) -> None:
    services = compose["services"]
    environment = strings(services["coordinator"]["environment"])
    cluster = configs.load(repository / environment["SHARDLANE_CONFIG"], (), environment).cluster
    assert cluster == configs.load(repository / environment["SHARDLANE_CONFIG"]).cluster
    assert services["shard"]["deploy"]["replicas"] == cluster.shards
    assert services["worker"]["deploy"]["replicas"] == cluster.stages * cluster.replicas


def test_compose_publishes_to_this_machine_only(compose: dict[str, Any]) -> None:
    """Metrics are plain text."""
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_scrapes_every_service(compose: dict[str, Any], repository: Path) -> None:
    prometheus = yaml.safe_load((repository / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    found = {
        name: discovery["port"]
        for job in prometheus["scrape_configs"]
        for discovery in job.get("dns_sd_configs", ())
        for name in discovery["names"]
    }
    assert found == dict.fromkeys(("coordinator", "shard", "worker"), METRICS_PORT)
    assert found.keys() <= compose["services"].keys()


# ---- the image ----------------------------------------------------------------------------------------------------------


def test_dockerfile_needs_no_newer_engine(repository: Path) -> None:
    text = (repository / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
    assert "# syntax" not in text and "--link" not in text and "<<" not in text
    assert f"USER {USER}:{USER}" in text and f"EXPOSE {GRPC_PORT} {METRICS_PORT}" in text


def test_what_the_dockerfile_copies_is_let_in(repository: Path) -> None:
    ignore = (repository / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied: set[str] = set()
    for line in (repository / "deploy/docker/Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied.update(line.split()[1:-1])
    assert copied == let_in and all((repository / path).exists() for path in copied)


# ---- Kubernetes ---------------------------------------------------------------------------------------------------------

BASE = "deploy/k8s/base"
WORKLOADS = {"StatefulSet", "Deployment"}


def documents(repository: Path) -> Iterator[dict[str, Any]]:
    kustomization = yaml.safe_load((repository / BASE / "kustomization.yaml").read_text(encoding="utf-8"))
    for name in kustomization["resources"]:
        yield from yaml.safe_load_all((repository / BASE / name).read_text(encoding="utf-8"))


def workloads(repository: Path) -> dict[str, dict[str, Any]]:
    """By component."""
    found = [each for each in documents(repository) if each["kind"] in WORKLOADS]
    return {each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in found}


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "10.0.0.7") for each in container.get("env", ())}


def test_manifests_are_what_kubernetes_takes(repository: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for each in documents(repository):
        validator.validate(each, validator.latest_version(), strict=True)


def test_every_file_is_listed(repository: Path) -> None:
    kustomization = yaml.safe_load((repository / BASE / "kustomization.yaml").read_text(encoding="utf-8"))
    listed = {*kustomization["resources"], *kustomization["configMapGenerator"][0]["files"], "kustomization.yaml"}
    assert {file.name for file in (repository / BASE).iterdir()} == listed


def test_no_manifest_names_a_namespace(repository: Path) -> None:
    assert all("namespace" not in each["metadata"] for each in documents(repository))


@pytest.mark.parametrize("component", ["coordinator", "shard", "worker"])
def test_kubernetes_services_parse(repository: Path, component: str) -> None:
    container = workloads(repository)[component]["spec"]["template"]["spec"]["containers"][0]
    flags = parse(container["args"], image_environment(repository) | environment_of(container))
    check_serving(flags)
    assert {port["containerPort"] for port in container["ports"]} == {GRPC_PORT, METRICS_PORT}
    assert all(container[probe]["grpc"]["port"] == GRPC_PORT for probe in ("startupProbe", "readinessProbe", "livenessProbe"))
    assert flags.advertise, "a pod's host name means nothing to other pods"


@pytest.mark.parametrize("component", ["coordinator", "shard", "worker"])
def test_pods_are_restricted(repository: Path, component: str) -> None:
    """As the Pod Security Standard of that name has it, and bounded in memory."""
    workload = workloads(repository)[component]
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["enableServiceLinks"] is False  # they would set variables that begin with SHARDLANE_
    for container in containers(workload):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_references_between_manifests_hold(repository: Path) -> None:
    by_kind = {kind: set[str]() for kind in ("Service", "PersistentVolumeClaim")}
    for each in documents(repository):
        by_kind.setdefault(each["kind"], set()).add(each["metadata"]["name"])
    for workload in workloads(repository).values():
        spec, pod = workload["spec"], workload["spec"]["template"]["spec"]
        assert spec.get("serviceName", "shardlane-shards") in by_kind["Service"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        volumes = {each["name"] for each in pod["volumes"]}
        volumes |= {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", ())}
        for container in containers(workload):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            host = environment_of(container).get("SHARDLANE_COORDINATOR", "shardlane-coordinator:7070").partition(":")[0]
            assert host in by_kind["Service"]
        claims = {each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
        assert claims <= by_kind["PersistentVolumeClaim"]


def test_kubernetes_starts_as_many_as_its_config_places(repository: Path) -> None:
    config = configs.load(repository / BASE / "config.toml")
    found = {component: workload["spec"]["replicas"] for component, workload in workloads(repository).items()}
    assert found == {
        "coordinator": 1,
        "shard": config.cluster.shards,
        "worker": config.cluster.stages * config.cluster.replicas,
    }
    coordinator = workloads(repository)["coordinator"]
    mounts = {mount["mountPath"] for container in containers(coordinator) for mount in container["volumeMounts"]}
    assert config.data.path.startswith("/shared/") and config.checkpoint.path.startswith("/shared/") and "/shared" in mounts
