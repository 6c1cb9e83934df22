"""Machines made of network namespaces reach one another, and are gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.wires import Wires

SERVE = "import socket; s = socket.create_server(('0.0.0.0', 7999)); print('ready', flush=True); s.accept()[0].sendall(b'hello')"
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 7999), timeout=10).recv(9).decode())"


def can_make_namespaces() -> bool:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        return False
    made = subprocess.run(["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", f"probe-{os.getpid()}"], capture_output=True, check=False)
    return made


@pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need root, ip and tc")
def test_machines_reach_one_another_and_leave_nothing_behind() -> None:
    with Wires(100) as wires:
        command = [*wires.prefix(1), sys.executable, "-c", SERVE]
        for prefix in (wires.prefix(0), []):  # from the other machine, and from here
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None and server.stdout.readline() == "ready\n"
                ask = [*prefix, sys.executable, "-c", ASK, wires.address(1)]
                assert subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout == "hello\n"
        rates = subprocess.run([*wires.prefix(0), "tc", "qdisc"], capture_output=True, text=True, check=True).stdout
        assert "tbf" in rates and "100Mbit" in rates
    assert "10.213." not in subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
