"""docker-compose.yml and the image start what the code has: commands that parse, ports, users, numbers of processes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
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
