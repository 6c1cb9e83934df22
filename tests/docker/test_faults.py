"""Services in containers are killed, cut off and restarted in turn, and more workers come: the run ends with the same bits."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from tests.docker.project import Project

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

CONFIG = "configs/tiny.toml"
NUM_SHARDS, NUM_WORKERS = 2, 4
STEPS = 10  # that are to be made while somebody is away
WAIT_SECONDS = 120
SCALE_SECONDS = 30
SETTINGS = f"""
x-settings: &settings
  SHARDLANE_CONFIG: {CONFIG}
  SHARDLANE_TRAIN__MAX_STEPS: "100000"
  SHARDLANE_VALIDATION__NUM_MICRO_BATCHES: "0"
services:
  prepare:
    command: [shardlane.cli, prepare, {CONFIG}, --run-dir, /runs/compose]
    environment: *settings
  coordinator: {{environment: *settings}}
"""


class Cluster:
    """The containers of a project, seen and disturbed through the engine's API, and what its coordinator says."""

    def __init__(self, project: Project, engine: docker.DockerClient) -> None:
        self.project = project
        self._engine = engine
        (self._network,) = engine.networks.list(names=[f"{project.name}_default"])

    def containers(self, service: str) -> list[Container]:
        labels = [f"com.docker.compose.project={self.project.name}", f"com.docker.compose.service={service}"]
        found = self._engine.containers.list(all=True, filters={"label": [*labels, "com.docker.compose.oneoff=False"]})
        return sorted(found, key=lambda each: str(each.name))

    @property
    def coordinator(self) -> Container:
        (found,) = self.containers("coordinator")
        return found

    def status(self) -> dict[str, Any]:
        """Empty while nobody answers. A restarted coordinator has another port on this machine."""
        published = self.coordinator.ports.get("8080/tcp")
        if not published:
            return {}
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{published[0]['HostPort']}/status.json", timeout=10) as response:
                return dict(json.load(response))
        except OSError:
            return {}

    def term(self) -> int:
        """Of the coordinator itself; the plan may be of an earlier one."""
        events = "\n".join(each["text"] for each in self.status()["events"])
        return int(re.findall(r"coordinator of term (\d+) has begun", events)[-1])

    def seated(self, replica: int, stage: int) -> Container:
        plan = self.status()["plan"]
        host = plan["members"][plan["replicas"][replica]["workers"][stage]]["address"].partition(":")[0]
        (found,) = [each for each in self.containers("worker") if each.id.startswith(host)]
        return found

    def incarnations(self, container: Container) -> set[str]:
        """Under which it is a member: none or one, and for a moment two."""
        members = [each["member"] for each in self.status().get("members", [])]
        return {each["incarnation"] for each in members if container.id.startswith(each["address"].partition(":")[0])}

    def is_whole(self, num_workers: int = NUM_WORKERS) -> bool:
        """Everybody is there and has taken up the plan, or the coordinator's death would keep it from them; and every chunk has
        its copies: shards with all of theirs share the primaries."""
        status = self.status()
        if status.get("state") != "RUN_STATE_TRAINING" or status["underReplicatedChunks"]:
            return False
        primaries = status["chunksByShard"]
        num_seated = sum(len(each["workers"]) for each in status["plan"]["replicas"])
        plans = [each.get("plan") for each in status["members"]]
        knows = plans.count(status["plan"]["number"]) == len(plans)
        return knows and num_seated == num_workers and len(primaries) == NUM_SHARDS and all(primaries)

    def wait(self, what: str, is_true: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not is_true():
            if time.monotonic() > end:
                logs = self.project.compose("logs", "--no-color", "--tail", "20")
                pytest.fail(f"{WAIT_SECONDS} s, and still not {what}: {json.dumps(self.status())[:4000]}\n{logs}")
            time.sleep(0.2)

    def wait_for_steps(self) -> None:
        begin = int(self.status()["version"])
        self.wait(f"{STEPS} steps more than {begin}", lambda: int(self.status().get("version", 0)) >= begin + STEPS)

    def cut_off(self, container: Container) -> Callable[[], None]:
        """Gives back how to undo it: under the same names as before."""
        aliases = container.attrs["NetworkSettings"]["Networks"][self._network.name]["Aliases"]
        self._network.disconnect(container)
        return lambda: self._network.connect(container, aliases=aliases)

    def kill(self, container: Container) -> Callable[[], None]:
        """The engine starts again what dies by itself, but not what it was told to kill."""
        container.kill()
        return container.start

    def shardlane(self, *arguments: str) -> str:
        return self.project.compose(
            "run", "--rm", "-T", "--no-deps", "prepare", "shardlane.cli", *arguments, seconds=WAIT_SECONDS
        )


@pytest.fixture(scope="module")
def cluster(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    override = tmp_path_factory.mktemp("compose") / "settings.yml"
    override.write_text(SETTINGS)
    project = Project(repository, override)
    engine = docker.from_env()
    try:
        project.start("shard", "worker")
        yield Cluster(project, engine)
    finally:
        engine.close()
        project.remove()


@pytest.fixture
def whole(cluster: Cluster) -> Cluster:
    cluster.wait("whole", cluster.is_whole)
    return cluster


@pytest.mark.parametrize("fault", ["kill", "cut_off"])
@pytest.mark.parametrize("who", ["a shard", "a worker of the first stage", "a worker of the last stage"])
def test_training_goes_on_without(whole: Cluster, who: str, fault: str) -> None:
    victim = whole.containers("shard")[0] if who == "a shard" else whole.seated(0, -1 if "last" in who else 0)
    before = whole.incarnations(victim)
    assert len(before) == 1
    undo = getattr(whole, fault)(victim)
    whole.wait(f"{who} away", lambda: not before & whole.incarnations(victim) and whole.status() != {})
    whole.wait_for_steps()
    undo()
    whole.wait("whole again", whole.is_whole)
    assert (whole.incarnations(victim) == before) == (fault == "cut_off"), "a process that lives is the same member"


def test_training_goes_on_without_its_coordinator(whole: Cluster) -> None:
    """While it is away, shards tell their version on `/metrics`."""
    shard = whole.containers("shard")[0]
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9100/metrics?name[]=shardlane_shard_version').read().decode())"

    def version() -> float:
        lines = shard.exec_run(["python", "-c", code]).output.decode().splitlines()
        return max(float(line.split()[1]) for line in lines if line.startswith("shardlane_shard_version "))

    undo = whole.kill(whole.coordinator)
    begin = version()
    whole.wait(f"{STEPS} steps more than {begin:.0f}", lambda: version() >= begin + STEPS)
    assert whole.status() == {}
    undo()
    whole.wait("whole again", whole.is_whole)
    whole.wait_for_steps()


def test_the_coordinator_is_restarted(whole: Cluster) -> None:
    term = whole.term()
    whole.coordinator.restart()
    whole.wait("whole again", whole.is_whole)
    whole.wait_for_steps()
    assert whole.term() == term + 1


def test_more_workers_are_another_replica(whole: Cluster) -> None:
    """As the head of docker-compose.yml says it; and when they go, the others have their lanes."""
    before = {each.id for service in ("coordinator", "shard", "worker") for each in whole.containers(service)}
    begin = time.monotonic()
    whole.project.compose("up", "--detach", "--no-deps", "--scale", "worker=6", "worker", seconds=WAIT_SECONDS)
    whole.wait("3 replicas", lambda: len(whole.status()["plan"]["replicas"]) == 3)
    seconds = time.monotonic() - begin
    print(f"3 replicas after {seconds:.1f} s")
    assert seconds < SCALE_SECONDS
    assert before <= {each.id for service in ("coordinator", "shard", "worker") for each in whole.containers(service)}
    whole.wait("whole", lambda: whole.is_whole(6))
    whole.wait_for_steps()
    whole.project.compose("up", "--detach", "--no-deps", "--scale", "worker=4", "worker", seconds=WAIT_SECONDS)
    whole.wait("2 replicas", whole.is_whole)
    assert {each.id for each in whole.containers("worker")} <= before


def test_what_ends_by_itself_is_started_again(whole: Cluster) -> None:
    """By the restart policy."""
    worker = whole.seated(1, 0)
    before = whole.incarnations(worker)
    assert worker.exec_run(["sh", "-c", "kill -TERM 1"]).exit_code == 0
    whole.wait("started again", lambda: bool(whole.incarnations(worker) - before))
    whole.wait("whole again", whole.is_whole)
    worker.reload()
    assert worker.attrs["RestartCount"] == 1


def test_everybody_is_healthy_and_nothing_went_wrong_unseen(whole: Cluster) -> None:
    everybody = [each for service in ("coordinator", "shard", "worker") for each in whole.containers(service)]
    assert len(everybody) == 1 + NUM_SHARDS + NUM_WORKERS

    def unhealthy() -> list[str]:
        for each in everybody:
            each.reload()
        return [each.name for each in everybody if each.attrs["State"]["Health"]["Status"] != "healthy"]

    whole.wait("healthy", lambda: unhealthy() == [])
    assert "Traceback" not in whole.project.compose("logs", "--no-color", "coordinator", "shard", "worker")


def test_the_digest_is_that_of_a_run_which_nothing_disturbed(whole: Cluster) -> None:
    """The last test, for it ends the run: with the bits that one process makes of it, every micro-batch counted once."""
    whole.shardlane("stop", "coordinator:7070")
    whole.wait("finished", lambda: whole.status()["state"] == "RUN_STATE_FINISHED")
    found, version = whole.shardlane("digest", "/runs/compose").split()
    settings = ["--data.path", "/runs/compose/data", "--train.stop_at_step", version]
    whole.shardlane("reference", CONFIG, "--run-dir", "/runs/reference", *settings)
    assert whole.shardlane("digest", "/runs/reference").split() == [found, version]
    proof = whole.shardlane("ledger", "/runs/compose")
    assert "exactly once" in proof and "superseded" not in proof
    print(f"version {version} has digest {found}")
