"""Two machines on one: network namespaces joined by a link of so many bits a second each way. Needs root.

What one machine sends the other passes a token bucket (`tc tbf`). What stays within a machine is not limited, as it is not
between processes of a real one; nor is what this process asks of either.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

BURST_BYTES = 256 << 10
QUEUE_MILLISECONDS = 100


class Wires:
    """Machines 0 and 1. Raises `RuntimeError` where they cannot be made."""

    def __init__(self, megabits: float) -> None:
        self._megabits = megabits
        self._name = f"sl{os.getpid() % 100_000}"
        self._spaces = [f"{self._name}-{index}" for index in range(2)]

    def __enter__(self) -> Self:
        try:
            for space in self._spaces:
                self._run("ip", "netns", "add", space)
            self._run("ip", "link", "add", self.interface(0), "type", "veth", "peer", "name", self.interface(1))
            for index, space in enumerate(self._spaces):
                self._run("ip", "link", "set", self.interface(index), "netns", space)
                self._set_up(index)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _set_up(self, index: int) -> None:
        """The link to the other machine, and one by which this process looks on."""
        within, link = self.prefix(index), self.interface(index)
        self._run(*within, "ip", "link", "set", "lo", "up")
        self._run(*within, "ip", "addr", "add", f"{self.address(index)}/24", "dev", link)
        self._run(*within, "ip", "link", "set", link, "up")
        bucket = ["root", "tbf", "rate", f"{self._megabits:g}mbit", "burst", str(BURST_BYTES)]
        self._run(*within, "tc", "qdisc", "add", "dev", link, *bucket, "latency", f"{QUEUE_MILLISECONDS}ms")
        outside, inside, net = f"{self._name}o{index}", f"{self._name}c{index}", f"10.213.{index + 1}"
        self._run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        self._run("ip", "link", "set", inside, "netns", self._spaces[index])
        self._run("ip", "addr", "add", f"{net}.1/30", "dev", outside)
        self._run("ip", "link", "set", outside, "up")
        self._run(*within, "ip", "addr", "add", f"{net}.2/30", "dev", inside)
        self._run(*within, "ip", "link", "set", inside, "up")
        self._run("ip", "route", "add", f"{self.address(index)}/32", "via", f"{net}.2")

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for index, space in enumerate(self._spaces):
            subprocess.run(["ip", "link", "del", f"{self._name}o{index}"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)

    def prefix(self, machine: int) -> list[str]:
        """Before a command, to run it there."""
        return ["ip", "netns", "exec", self._spaces[machine]]

    def address(self, machine: int) -> str:
        return f"10.213.0.{machine + 1}"

    def interface(self, machine: int) -> str:
        return f"{self._name}i{machine}"

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
