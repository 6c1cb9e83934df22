"""An S3 server as a process of its own (moto), behind a gate that a test shuts and opens: shut, its port refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

BUCKET = "runs"
SECONDS_MAX = 30.0


class Gate:
    """Carries connections to `target`, a loopback port."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._sockets: set[socket.socket] = set()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    def open(self) -> None:
        self._listener = self._listen(self.port)

    def shut(self) -> None:
        end(self._listener)
        for each in tuple(self._sockets):
            end(each)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self._target))
            for pair in ((client, upstream), (upstream, client)):
                self._sockets.add(pair[0])
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        end(source)
        end(sink)
        self._sockets.discard(source)


def end(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)  # wakes whoever reads it
    each.close()


@contextmanager
def s3_server() -> Iterator[Gate]:
    """An empty bucket, and an environment, for this process and those that it starts, that leads to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SECONDS_MAX
        while True:
            try:
                make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
                with urllib.request.urlopen(make, timeout=SECONDS_MAX):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, "the S3 server does not come up"
                time.sleep(0.05)
        gate = Gate(port)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)  # a developer's own must not reach the tests
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
            patch.setenv("AWS_REGION", "us-east-1")
            yield gate
        gate.shut()
    finally:
        server.kill()
        server.wait()
