"""Relays carry bytes, fall silent without closing, heal, and refuse when their target is gone."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from shardlane.chaos.relay import Relays, free_port, ports_of


class Echo:
    """Answers with what it gets."""

    def __init__(self, port: int) -> None:
        self.server = socket.create_server(("127.0.0.1", port))
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """As if it were killed."""
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # a close alone waits for the thread that reads
            connection.close()


@pytest.fixture
def relays() -> Iterator[Relays]:
    with Relays() as made:
        yield made


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo(free_port())
    yield made
    made.close()


def address(echo: Echo) -> str:
    return f"127.0.0.1:{echo.server.getsockname()[1]}"


def connect(door: str) -> socket.socket:
    """As soon as the door is open."""
    host, _, port = door.rpartition(":")
    end = time.monotonic() + 10.0
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=10.0)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def ask(connection: socket.socket, data: bytes) -> bytes:
    threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
    got = bytearray()
    while len(got) < len(data):
        got += connection.recv(1 << 20)
    return bytes(got)


def hears_nothing(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        connection.settimeout(10.0)


def test_bytes_pass_both_ways_and_so_does_the_end(relays: Relays, echo: Echo) -> None:
    with connect(relays.add(address(echo))) as connection:
        data = os.urandom(5_000_000)  # many buffers
        assert ask(connection, data) == data
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_silent_door_holds_everything_up_and_nothing_is_lost(relays: Relays, echo: Echo) -> None:
    silent, other = relays.add(address(echo)), relays.add(address(echo))
    with connect(silent) as before, connect(other) as elsewhere:
        assert ask(before, b"a") == b"a"
        relays.silence([silent])
        before.sendall(b"held")
        with connect(silent) as during:  # accepted, as by a machine whose cable was pulled a moment later
            during.sendall(b"up")
            assert hears_nothing(before) and hears_nothing(during)
            assert ask(elsewhere, b"b") == b"b"
            relays.heal()
            assert before.recv(4) == b"held" and during.recv(2) == b"up"


def test_connections_that_a_process_has_opened_fall_silent_with_it(relays: Relays, echo: Echo) -> None:
    with connect(relays.add(address(echo))) as connection:
        assert connection.getsockname()[1] in ports_of([os.getpid()])
        assert ask(connection, b"a") == b"a"
        relays.silence([], [os.getpid()])
        connection.sendall(b"held")
        assert hears_nothing(connection)
        relays.heal()
        assert connection.recv(4) == b"held"


def test_a_dead_target_is_refused_through_its_door_until_it_is_back(relays: Relays) -> None:
    port = free_port()
    first = Echo(port)
    door = relays.add(f"127.0.0.1:{port}")
    with connect(door) as connection:
        assert ask(connection, b"a") == b"a"
        first.close()
        assert gone(connection)
    end = time.monotonic() + 10.0
    while not is_refused(door):
        assert time.monotonic() < end
    second = Echo(port)
    with connect(door) as connection:
        assert ask(connection, b"b") == b"b"
    second.close()


def gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_refused(door: str) -> bool:
    host, _, port = door.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # the door was just being shut
        return False
    return False
