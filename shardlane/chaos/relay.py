"""TCP relays in front of processes, which can fall silent without closing: half-open connections, as a pulled cable leaves them.

One thread carries all of them. A relay listens only while its target does, so that a dead process is refused through it, too.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

BUFFER_BYTES = 1 << 18  # a direction; a full one stops reading
CONNECT_SECONDS = 0.2
LOOK_SECONDS = 0.05  # between two looks for a target that is not there
LOOPBACK = "127.0.0.1"


class Relays:
    """Runs while it is entered. Public methods may be called from any thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._calls: list[tuple[Callable[[], None], Future[None]]] = []
        self._lock = threading.Lock()
        self._doors: list[_Door] = []
        self._pipes: set[_Pipe] = set()
        self._silent: frozenset[str] = frozenset()  # doors
        self._silent_pids: frozenset[int] = frozenset()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="relays", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._is_closed = True
        self._wake_writer.send(b"x")
        self._thread.join()
        for pipe in self._pipes:
            pipe.close()
        for door in self._doors:
            door.listener.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def add(self, target: str) -> str:
        """host:port of another relay to the loopback address `target`."""
        door = _Door(target)
        self._call(lambda: self._doors.append(door))
        return door.address

    def silence(self, doors: Collection[str], pids: Collection[int] = ()) -> None:
        """Nothing passes through `doors` any more, nor through any on connections that processes `pids` have opened."""
        self._call(lambda: self._set_silent(self._silent | set(doors), self._silent_pids | set(pids)))

    def heal(self) -> None:
        """Everything passes again, what was held up first."""
        self._call(lambda: self._set_silent(frozenset(), frozenset()))

    # ---- the thread ----------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[], None]) -> None:
        done: Future[None] = Future()
        with self._lock:
            self._calls.append((call, done))
        self._wake_writer.send(b"x")
        done.result(timeout=10.0)

    def _run(self) -> None:
        while not self._is_closed:
            closed = [door for door in self._doors if not door.is_open]
            for key, events in self._selector.select(LOOK_SECONDS if closed else None):
                match key.data:
                    case _Door() as door:
                        self._accept(door)
                    case _Pipe() as pipe:
                        self._carry(pipe, key.fileobj, events)  # type: ignore[arg-type]  # of a pipe: a socket
                    case _:
                        self._wake_reader.recv(4096)
            for door in closed:
                if door.try_open():
                    self._selector.register(door.listener, selectors.EVENT_READ, door)
            with self._lock:
                calls, self._calls = self._calls, []
            for call, done in calls:
                call()
                done.set_result(None)

    def _accept(self, door: _Door) -> None:
        try:
            client, (_, port, *_) = door.listener.accept()
        except OSError:
            return
        try:
            upstream = socket.create_connection(door.target, timeout=CONNECT_SECONDS)
        except OSError:  # the process is gone: so is its port
            reset(client)
            self._selector.unregister(door.listener)
            door.shut()
            return
        pipe = _Pipe(door.address, port, client, upstream)
        self._pipes.add(pipe)
        pipe.is_silent = self._is_silent(pipe, ports_of(self._silent_pids))
        self._watch(pipe)

    def _carry(self, pipe: _Pipe, side: socket.socket, events: int) -> None:
        if pipe not in self._pipes or pipe.is_silent:
            return  # of the same look at the sockets
        try:
            pipe.carry(side, events)
        except BlockingIOError:
            pass
        except OSError:
            self._end(pipe)
            return
        if pipe.is_done:
            self._end(pipe)
        else:
            self._watch(pipe)

    def _watch(self, pipe: _Pipe) -> None:
        for side in pipe.sides:
            events = 0 if pipe.is_silent else pipe.wanted(side)
            is_registered = side in self._selector.get_map()
            if events and is_registered:
                self._selector.modify(side, events, pipe)
            elif events:
                self._selector.register(side, events, pipe)
            elif is_registered:
                self._selector.unregister(side)

    def _end(self, pipe: _Pipe) -> None:
        self._pipes.discard(pipe)
        for side in pipe.sides:
            if side in self._selector.get_map():
                self._selector.unregister(side)
        pipe.close()

    def _set_silent(self, doors: frozenset[str], pids: frozenset[int]) -> None:
        self._silent, self._silent_pids = doors, pids
        ports = ports_of(pids)
        for pipe in self._pipes:
            pipe.is_silent = self._is_silent(pipe, ports)
            self._watch(pipe)

    def _is_silent(self, pipe: _Pipe, ports: Collection[int]) -> bool:
        return pipe.door in self._silent or pipe.client_port in ports


class _Door:
    """A port of ours before a target."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = host, int(port)
        self.is_open = False
        self.listener = _bound(0)
        self.address = f"{LOOPBACK}:{self.listener.getsockname()[1]}"

    def try_open(self) -> bool:
        """Whether the target is there, and so are we."""
        with suppress(OSError):
            socket.create_connection(self.target, timeout=CONNECT_SECONDS).close()
            self.listener.listen(128)
            self.is_open = True
        return self.is_open

    def shut(self) -> None:
        """The port stays ours, and refuses."""
        self.listener.close()
        self.listener = _bound(int(self.address.rpartition(":")[2]))
        self.is_open = False


class _Pipe:
    """Two connections, and what is on its way from one to the other."""

    def __init__(self, door: str, client_port: int, client: socket.socket, upstream: socket.socket) -> None:
        self.door = door
        self.client_port = client_port
        self.sides = client, upstream
        self.is_silent = False
        self._other = {client: upstream, upstream: client}
        self._pending = {client: bytearray(), upstream: bytearray()}  # to be sent there
        self._ended = {client: False, upstream: False}  # nothing more comes from there
        for side in self.sides:
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def wanted(self, side: socket.socket) -> int:
        """Events of `side` that matter now."""
        reads = not self._ended[side] and len(self._pending[self._other[side]]) < BUFFER_BYTES
        return (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if self._pending[side] else 0)

    def carry(self, side: socket.socket, events: int) -> None:
        """Raises `OSError` when a side is broken."""
        other = self._other[side]
        if events & selectors.EVENT_READ:
            data = side.recv(BUFFER_BYTES)
            self._ended[side] = not data
            self._pending[other] += data
            self._send(other)
        if events & selectors.EVENT_WRITE:
            self._send(side)

    def _send(self, side: socket.socket) -> None:
        pending = self._pending[side]
        with suppress(BlockingIOError):
            while pending:
                del pending[: side.send(pending)]
        if not pending and self._ended[self._other[side]]:
            side.shutdown(socket.SHUT_WR)

    @property
    def is_done(self) -> bool:
        return all(self._ended.values()) and not any(self._pending.values())

    def close(self) -> None:
        for side in self.sides:
            reset(side)


def reset(connection: socket.socket) -> None:
    """Closes it as a process that is killed does, without waiting for what was sent."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _bound(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setblocking(False)  # who wanted in may be gone before we accept
    made.bind((LOOPBACK, port))
    return made


def free_port() -> int:
    """One that nobody has at present."""
    with _bound(0) as found:
        return int(found.getsockname()[1])


def ports_of(pids: Collection[int]) -> set[int]:
    """Local TCP ports of connections that processes hold."""
    if not pids:
        return set()
    sockets = set()
    for pid in pids:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(str(link.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in sockets:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found
