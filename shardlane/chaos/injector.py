"""Does faults to the processes of a running cluster, and undoes those that can be undone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

from shardlane.chaos.schedule import Kind, Target
from shardlane.cli.cluster import Cluster
from shardlane.cli.run_folder import RunFolder
from shardlane.pb.coordinator_pb2 import GetStatusResponse


class Injector:
    """`heal` may be called twice for a victim, and for one that has died meanwhile."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def victim(self, target: Target, status: GetStatusResponse, cluster: Cluster) -> str | None:
        """The name of the process that holds a place at present; None if it has not said yet that it is there."""
        if target.role != "worker":
            return target.role if target.role == "coordinator" else f"shard-{target.index}"
        address = status.plan.members[status.plan.replicas[target.index].workers[target.stage]].address
        for name, child in cluster.children.items():
            ready = self._folder.ready(name)
            if ready.get("address") == address and ready.get("pid") == child.pid:
                return name
        return None

    def inflict(self, kind: Kind, name: str, cluster: Cluster) -> Callable[[], None]:
        """What undoes it."""
        child = cluster.children[name]
        match kind:
            case Kind.KILL:
                child.send(signal.SIGKILL)
                return lambda: None
            case Kind.STOP:
                child.send(signal.SIGSTOP)
                return lambda: child.send(signal.SIGCONT)
            case Kind.HALF_OPEN:
                raise NotImplementedError


def dump_stacks(cluster: Cluster) -> None:
    """Every process writes to its log where its threads are."""
    for child in cluster.children.values():
        with suppress(OSError):
            if child.status is None:
                os.kill(child.pid, signal.SIGUSR1)
