"""The status page of a coordinator that has members and a few steps, and requests to it byte by byte."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.core.steering import HEADER
from coordinator.status_page import StatusPage
from shardlane.metrics import Metrics
from tests.coordinator.test_service import NAMES, Cluster, cluster

TOKEN = "0123456789abcdef" * 2


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Site:
    """A run and its page."""

    cluster: Cluster
    page: StatusPage
    metrics: Metrics

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Underscores in header names stand for dashes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def steer(self, action: str, token: str = TOKEN, **headers: str) -> Answer:
        body = b'{"action": "%s"}' % action.encode()
        return self.ask("POST", "/control", body, Authorization=f"Bearer {token}", **{HEADER: "1"}, **headers)

    def say(self, data: bytes) -> bytes:
        """All that comes back."""
        with socket.create_connection(("127.0.0.1", self.page.port), timeout=30) as connection:
            connection.sendall(data)
            pieces = []
            while piece := connection.recv(1 << 16):
                pieces.append(piece)
        return b"".join(pieces)

    def attempts(self, outcome: str) -> float | None:
        name = "shardlane_coordinator_control_attempts_total"
        return self.metrics.registry.get_sample_value(name, {"outcome": outcome})

    def train(self, *steps: int) -> None:
        self.cluster.beat("shard 1", *steps)


@contextmanager
def site(run_dir: Path, *, has_token: bool = True, **changes: Any) -> Iterator[Site]:
    """Everybody is here, and two steps are done."""
    token_file = run_dir / "control.token"
    token_file.write_text(f"{TOKEN}\n")
    metrics = Metrics("coordinator")
    page = StatusPage("127.0.0.1:0", metrics, token_file=token_file if has_token else None)
    try:
        with cluster(run_dir, train__max_steps=100, **changes) as run:
            run.register(*NAMES)
            page.start(run.service.coordinator)
            made = Site(run, page, metrics)
            made.train(0, 1)
            yield made
    finally:
        page.close()
