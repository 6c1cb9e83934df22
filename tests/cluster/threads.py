"""A whole cluster in this process: every service real, on loopback gRPC, its threads beside those of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from coordinator.core.events import RunState
from coordinator.service import CoordinatorService
from ps_service.service import ShardService
from shardlane import rpc
from shardlane.config import Config
from shardlane.credentials import Credential
from shardlane.data import TokenFolder
from shardlane.digest import checkpoint_digest
from shardlane.manifest import newest_complete
from shardlane.member import fetch_run
from shardlane.reference import Reference
from worker_service.service import WorkerService

RUN_SECONDS_MAX = 100.0


class Cluster:
    """Services of one run, started in the order of `shardlane local`."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        fork: bool = False,
        network_of: Callable[[str], rpc.Network] = lambda role: rpc.PLAIN,
        join_secret_file: Path | None = None,
    ) -> None:
        """`network_of` gives a role's; members make their join tokens with the secret."""
        self.run_dir = run_dir
        self.coordinator = CoordinatorService(
            config, run_dir=run_dir, fork=fork, network=network_of("coordinator"), join_secret_file=join_secret_file
        )
        self.coordinator.start()
        address, shape = self.coordinator.address, config.cluster
        credential = Credential(secret_file=join_secret_file)
        self.run = fetch_run(address, network=network_of("shard"), credential=credential)
        self.shards = [ShardService(address, self.run) for _ in range(shape.shards)]
        run = fetch_run(address, network=network_of("worker"), credential=credential)
        self.workers = [WorkerService(address, run, device="cpu") for _ in range(shape.stages * shape.replicas)]
        for member in (*self.shards, *self.workers):
            member.start()

    def wait(self) -> None:
        state = self.coordinator.wait_finished(RUN_SECONDS_MAX)
        assert state is RunState.FINISHED, f"the run is {state!r}"

    def stop(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.coordinator.stop)
            for member in (*self.shards, *self.workers):
                stack.callback(member.stop)


@contextmanager
def running(
    config: Config,
    run_dir: Path,
    *,
    fork: bool = False,
    network_of: Callable[[str], rpc.Network] = lambda role: rpc.PLAIN,
    join_secret_file: Path | None = None,
) -> Iterator[Cluster]:
    cluster = Cluster(config, run_dir, fork=fork, network_of=network_of, join_secret_file=join_secret_file)
    try:
        yield cluster
    finally:
        cluster.stop()


def train(config: Config, run_dir: Path, *, fork: bool = False) -> str:
    """Runs to the end; the digest."""
    with running(config, run_dir, fork=fork) as cluster:
        cluster.wait()
    return digest_of(run_dir)


def digest_of(run_dir: Path) -> str:
    folder = newest_complete(run_dir / "checkpoints")
    assert folder is not None, "no complete checkpoint"
    return checkpoint_digest(folder)


def train_reference(config: Config, tokens: TokenFolder) -> tuple[str, list[dict[str, Any]]]:
    """The oracle's digest and rows."""
    oracle = Reference(config, tokens)
    rows = list(oracle.run())
    return oracle.digest(), [dict(row) for row in rows]


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def comparable(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, Any], ...]]:
    """Rows without what depends on time, training rows by step before validation rows by version."""
    kept = [tuple((key, value) for key, value in row.items() if key != "tokens_per_second") for row in rows]
    return sorted(kept, key=lambda row: (any(key == "val_loss" for key, _ in row), dict(row)["step"]))
