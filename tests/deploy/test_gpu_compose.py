"""docker-compose.gpu.yml over docker-compose.yml, as Compose itself puts them together; no engine is needed for that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_manifests import check_serving, image_environment, parse, strings

ROLES = {"prepare", "certs", "coordinator", "shard", "worker"}


def merged(repository: Path, **environment: str) -> dict[str, Any]:
    if shutil.which("docker") is None:
        pytest.skip("there is no docker client")
    compose = ["docker", "compose", "--file", "docker-compose.yml", "--file", "docker-compose.gpu.yml"]
    if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("the docker client has no compose")
    done = subprocess.run(
        [*compose, "config", "--format", "json"],
        cwd=repository,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_workers_get_a_gpu_and_say_so(repository: Path) -> None:
    services = merged(repository)
    flags = parse(services["worker"]["command"], image_environment(repository) | strings(services["worker"]["environment"]))
    check_serving(flags)
    assert flags.device == "cuda"
    deploy = services["worker"]["deploy"]
    [device] = deploy["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["0"], ["gpu"])
    assert deploy["replicas"] == 4
    for name in services.keys() - {"worker"}:
        assert not services[name].get("deploy", {}).get("resources")
    [device] = merged(repository, GPU="1")["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["1"]


def test_everybody_runs_the_cuda_image_built_from_the_index_that_kubernetes_names(repository: Path) -> None:
    services = merged(repository)
    assert {services[role]["image"] for role in ROLES} == {"shardlane:cuda"}
    index = services["prepare"]["build"]["args"]["TORCH_INDEX"]
    component = (repository / "deploy/k8s/components/gpu/kustomization.yaml").read_text(encoding="utf-8")
    assert f"TORCH_INDEX={index}" in component
    others = merged(repository, TORCH_INDEX="https://torch.example/cu", SHARDLANE_IMAGE="registry.example/shardlane:1")
    assert others["prepare"]["build"]["args"]["TORCH_INDEX"] == "https://torch.example/cu"
    assert {others[role]["image"] for role in ROLES} == {"registry.example/shardlane:1"}
