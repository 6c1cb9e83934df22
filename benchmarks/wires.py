"""Two machines on one: network namespaces joined by links of so many bits a second, this process in the middle. Needs root.

Each machine's traffic passes a token bucket (`tc tbf`) on its way out, and another one on its way in. What stays within a machine
is not limited, as it is not between processes of a real one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

HOST = "10.213.0.254"
BURST_BYTES = 256 << 10
QUEUE_MILLISECONDS = 100


class Wires:
    """Machines 0 and 1. Raises `RuntimeError` where they cannot be made."""

    def __init__(self, megabits: float) -> None:
        self._megabits = megabits
        self._bridge = f"sl{os.getpid() % 100_000}"
        self._spaces = [f"{self._bridge}-{index}" for index in range(2)]

    def __enter__(self) -> Self:
        try:
            self._run("ip", "link", "add", self._bridge, "type", "bridge")
            self._run("ip", "addr", "add", f"{HOST}/24", "dev", self._bridge)
            self._run("ip", "link", "set", self._bridge, "up")
            for index, space in enumerate(self._spaces):
                self._join(index, space)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _join(self, index: int, space: str) -> None:
        outside, inside = f"{self._bridge}o{index}", f"{self._bridge}i{index}"
        self._run("ip", "netns", "add", space)
        self._run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        self._run("ip", "link", "set", inside, "netns", space)
        self._run("ip", "link", "set", outside, "master", self._bridge)
        self._run("ip", "link", "set", outside, "up")
        within = self.prefix(index)
        self._run(*within, "ip", "addr", "add", f"{self.address(index)}/24", "dev", inside)
        self._run(*within, "ip", "link", "set", inside, "up")
        self._run(*within, "ip", "link", "set", "lo", "up")
        bucket = ["root", "tbf", "rate", f"{self._megabits:g}mbit", "burst", str(BURST_BYTES)]
        bucket += ["latency", f"{QUEUE_MILLISECONDS}ms"]
        self._run("tc", "qdisc", "add", "dev", outside, *bucket)
        self._run(*within, "tc", "qdisc", "add", "dev", inside, *bucket)

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)

    def prefix(self, machine: int) -> list[str]:
        """Before a command, to run it there."""
        return ["ip", "netns", "exec", self._spaces[machine]]

    def address(self, machine: int) -> str:
        return f"10.213.0.{machine + 1}"

    def interface(self, machine: int) -> str:
        return f"{self._bridge}i{machine}"

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}; network namespaces need root and iproute2")


def placed(command: Sequence[str], wires: Wires, machine: int) -> list[str]:
    """One of our services on a machine, reached by its address; the network is this machine's own."""
    here = wires.address(machine)
    flags = ["--bind", f"{here}:0", "--metrics-bind", f"{here}:0", "--insecure"]
    return [*wires.prefix(machine), *command, *flags]
