"""Does faults to the processes of a running cluster, and undoes those that can be undone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

from shardlane.chaos.relay import LOOPBACK, Relays, free_port
from shardlane.chaos.schedule import Kind, Target
from shardlane.cli.cluster import Cluster, Command, Commands
from shardlane.cli.run_folder import RunFolder
from shardlane.pb.coordinator_pb2 import GetStatusResponse


class Injector:
    """What `inflict` returns may be called for a victim that has died meanwhile."""

    def __init__(self, folder: RunFolder, relays: Relays) -> None:
        self._folder = folder
        self._relays = relays
        self._doors: dict[str, list[str]] = {}  # by process: where others reach it, and it the coordinator

    def behind_relays(self, commands: Commands) -> Commands:
        """The same processes, on connections that can be cut off."""

        def members(coordinator: str) -> dict[str, Command]:
            made = {}
            for name, command in commands.members(coordinator).items():
                port = free_port()  # the same for each life: the relay stays before it
                inward, outward = self._relays.add(f"{LOOPBACK}:{port}"), self._relays.add(coordinator)
                self._doors[name] = [inward, outward]
                at = command.index("--coordinator") + 1
                made[name] = [*command[:at], outward, *command[at + 1 :], "--bind", f"{LOOPBACK}:{port}", "--advertise", inward]
            return made

        return Commands(commands.coordinator, members)

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
                doors = [outward for _, outward in self._doors.values()] if name == "coordinator" else self._doors[name]
                self._relays.silence(doors, [child.pid])
                return self._relays.heal


def dump_stacks(cluster: Cluster) -> None:
    """Every process writes to its log where its threads are."""
    for child in cluster.children.values():
        with suppress(OSError):
            if child.status is None:
                os.kill(child.pid, signal.SIGUSR1)
