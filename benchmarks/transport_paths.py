"""Four ways to stream the same bytes between two processes: ours, generated classes, raw bytes over gRPC, raw TCP.

All move chunks of 4 MiB in one message each, out of and into the same buffers, which are used again; the gRPC ones
share channel and server options. What is pushed is put together in the receiver's buffer, and so is what is pulled.
`python -m benchmarks.transport_paths KIND NUM_BYTES [CERTS]` is the server's process; given a folder of certificates, ours speaks
TLS.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any, Literal, Protocol, cast

import grpc
import torch

from benchmarks.children import serve
from shardlane import rpc, wire
from shardlane.chunks import Assembly, byte_view
from shardlane.pb import ps_pb2, ps_pb2_grpc, tensor_pb2
from shardlane.tls import Tls

Kind = Literal["ours", "generated", "raw", "tcp"]
KINDS: tuple[Kind, ...] = ("ours", "generated", "raw", "tcp")
CHUNK_BYTES = 4 << 20
DEADLINE_SECONDS = 120.0
SERVICE = ps_pb2.DESCRIPTOR.services_by_name["ParameterShard"]
_RAW = "benchmarks.Raw"
_RUN = "benchmark"
_PUSH, _PULL = b"s", b"l"

Header = ps_pb2.PushRequest | ps_pb2.PullResponse


class Buffer:
    """What a process sends from and receives into: `num_bytes` of touched memory, in chunks."""

    def __init__(self, num_bytes: int) -> None:
        if num_bytes % CHUNK_BYTES:
            raise ValueError(f"{num_bytes} bytes are not whole chunks of {CHUNK_BYTES}")
        self.values = torch.full((num_bytes // 4,), 1e-3)
        self.chunks = self.values.split(CHUNK_BYTES // 4)
        self.view = byte_view(self.values)


def _slice(start: int) -> tensor_pb2.Slice:
    return tensor_pb2.Slice(dtype=tensor_pb2.D_TYPE_FLOAT32, offset=start, total=CHUNK_BYTES)


def push_pieces(buffer: Buffer) -> Iterator[tuple[ps_pb2.PushRequest, memoryview]]:
    """Headers as a worker sends them, and the values of each."""
    for index, values in enumerate(buffer.chunks):
        view = byte_view(values)
        header = ps_pb2.PushRequest(run_id=_RUN, step=7, block=tensor_pb2.Block(first=0, size=4), chunk=index, tokens=4096)
        for start, end in wire.payload_ranges(len(view)):
            header.slice.CopyFrom(_slice(start))
            yield header, view[start:end]


def pull_pieces(buffer: Buffer, version: int) -> Iterator[tuple[ps_pb2.PullResponse, memoryview]]:
    for index, values in enumerate(buffer.chunks):
        view = byte_view(values)
        for start, end in wire.payload_ranges(len(view)):
            header = ps_pb2.PullResponse(chunk=index, version=version, outcome=ps_pb2.PULL_OUTCOME_DATA, slice=_slice(start))
            yield header, view[start:end]


class Receiver:
    """Puts arriving pieces together, checked as our services check them."""

    def __init__(self, buffer: Buffer) -> None:
        self._chunks = buffer.chunks
        self._assembly: Assembly | None = None
        self.num_chunks = 0

    def take(self, header: Header, payload: wire.Buffer) -> None:
        what = f"chunk {header.chunk}"
        wire.check_slice(header.slice, payload, total_bytes_max=CHUNK_BYTES, what=what)
        if self._assembly is None:
            self._assembly = Assembly(self._chunks[header.chunk], what)
        if self._assembly.add(header.slice, payload):
            self._assembly = None
            self.num_chunks += 1


# ---- servers ----------------------------------------------------------------------------------------------------------


class _PushAndPull(ps_pb2_grpc.ParameterShardServicer):
    def Deliver(self, request_iterator: Iterator[Any], context: object) -> ps_pb2.DeliverResponse:
        raise NotImplementedError("nothing is delivered between shards here")


class OurServicer(_PushAndPull):
    """Behind `rpc.handler`: messages are `wire.Framed`."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def Push(self, request_iterator: Iterator[Any], context: object) -> ps_pb2.PushResponse:
        receiver = Receiver(self._buffer)
        for piece in request_iterator:
            receiver.take(piece.header, piece.payload)
        return ps_pb2.PushResponse(num_counted=receiver.num_chunks)

    def Pull(self, request: ps_pb2.PullRequest, context: object) -> Iterator[Any]:
        for header, values in pull_pieces(self._buffer, request.version):
            yield wire.Framed(header, values)


class GeneratedServicer(_PushAndPull):
    """The same as gRPC's own classes have it."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def Push(self, request_iterator: Iterator[ps_pb2.PushRequest], context: object) -> ps_pb2.PushResponse:
        receiver = Receiver(self._buffer)
        for message in request_iterator:
            receiver.take(message, message.payload)
        return ps_pb2.PushResponse(num_counted=receiver.num_chunks)

    def Pull(self, request: ps_pb2.PullRequest, context: object) -> Iterator[ps_pb2.PullResponse]:
        for header, values in pull_pieces(self._buffer, request.version):
            header.payload = bytes(values)
            yield header


class _Catcher:
    """Stands for a server when generated code registers, to have the handler alone."""

    def __init__(self) -> None:
        self.handler: grpc.GenericRpcHandler | None = None

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        (self.handler,) = handlers

    def add_registered_method_handlers(self, *_: object) -> None:
        """An index by full name of what the handler above routes as well."""


def generated_handler(servicer: ps_pb2_grpc.ParameterShardServicer) -> grpc.GenericRpcHandler:
    catcher = _Catcher()
    ps_pb2_grpc.add_ParameterShardServicer_to_server(servicer, cast(grpc.Server, catcher))
    assert catcher.handler is not None
    return catcher.handler


def raw_handler(buffer: Buffer) -> grpc.GenericRpcHandler:
    """Bytes as they are; a receiver copies them to where they belong, as the others do."""

    def push(messages: Iterator[bytes], context: object) -> bytes:
        copy_in(buffer, messages)
        return b"."

    def pull(request: bytes, context: object) -> Iterator[bytes]:
        for start, end in wire.payload_ranges(len(buffer.view)):
            yield bytes(buffer.view[start:end])

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Push": grpc.stream_unary_rpc_method_handler(push),
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
    }
    return grpc.method_handlers_generic_handler(_RAW, methods)


def copy_in(buffer: Buffer, messages: Iterator[bytes]) -> None:
    position = 0
    target = buffer.values.view(torch.uint8).numpy()
    for message in messages:
        end = position + len(message)
        target[position:end] = memoryview(message)
        position = end


def tcp_server(buffer: Buffer) -> int:
    """Serves one connection from a thread; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while direction := connection.recv(1):
            if direction == _PUSH:
                receive(connection, buffer.view)
                connection.sendall(b".")
            else:
                connection.sendall(buffer.view)

    threading.Thread(target=run, name="tcp", daemon=True).start()
    return int(listener.getsockname()[1])


def receive(connection: socket.socket, view: memoryview) -> None:
    position = 0
    while position < len(view):
        num_bytes = connection.recv_into(view[position:])
        if not num_bytes:
            raise ConnectionError(f"the peer has closed after {position} of {len(view)} bytes")
        position += num_bytes


def start_server(kind: Kind, buffer: Buffer, network: rpc.Network) -> tuple[int, object]:
    """(port, what must stay alive). Raw TCP knows of no `network`."""
    if kind == "tcp":
        return tcp_server(buffer), None
    handlers: dict[str, grpc.GenericRpcHandler] = {
        "ours": rpc.handler(SERVICE, OurServicer(buffer)),
        "generated": generated_handler(GeneratedServicer(buffer)),
        "raw": raw_handler(buffer),
    }
    server = network.serve("127.0.0.1:0", {_RAW if kind == "raw" else SERVICE.full_name: handlers[kind]})
    server.start()
    return server.port, server


# ---- clients ----------------------------------------------------------------------------------------------------------


class Path(Protocol):
    def push(self) -> None: ...
    def pull(self) -> None: ...
    def close(self) -> None: ...


class OurPath:
    def __init__(self, port: int, buffer: Buffer, network: rpc.Network = rpc.PLAIN) -> None:
        self._channel = network.connect(f"127.0.0.1:{port}", to="shard")
        self._client = rpc.Client(self._channel, SERVICE)
        self._buffer = buffer

    def close(self) -> None:
        self._channel.close()

    def push(self) -> None:
        pieces = (wire.Framed(header, values) for header, values in push_pieces(self._buffer))
        response = self._client.Push(pieces, timeout=DEADLINE_SECONDS)
        _expect(response.num_counted, self._buffer)

    def pull(self) -> None:
        receiver = Receiver(self._buffer)
        for piece in self._client.Pull(ps_pb2.PullRequest(run_id=_RUN, version=7), timeout=DEADLINE_SECONDS):
            receiver.take(piece.header, piece.payload)
        _expect(receiver.num_chunks, self._buffer)


class GeneratedPath:
    def __init__(self, port: int, buffer: Buffer) -> None:
        self._channel = rpc.connect(f"127.0.0.1:{port}")
        self._stub = ps_pb2_grpc.ParameterShardStub(self._channel)
        self._buffer = buffer

    def close(self) -> None:
        self._channel.close()

    def _messages(self) -> Iterator[ps_pb2.PushRequest]:
        for header, values in push_pieces(self._buffer):
            header.payload = bytes(values)
            yield header

    def push(self) -> None:
        _expect(self._stub.Push(self._messages(), timeout=DEADLINE_SECONDS).num_counted, self._buffer)

    def pull(self) -> None:
        receiver = Receiver(self._buffer)
        for message in self._stub.Pull(ps_pb2.PullRequest(run_id=_RUN, version=7), timeout=DEADLINE_SECONDS):
            receiver.take(message, message.payload)
        _expect(receiver.num_chunks, self._buffer)


class RawPath:
    def __init__(self, port: int, buffer: Buffer) -> None:
        self._channel = rpc.connect(f"127.0.0.1:{port}")
        self._push: Callable[..., Any] = self._channel.stream_unary(f"/{_RAW}/Push")
        self._pull: Callable[..., Any] = self._channel.unary_stream(f"/{_RAW}/Pull")
        self._buffer = buffer

    def close(self) -> None:
        self._channel.close()

    def push(self) -> None:
        view = self._buffer.view
        messages = (bytes(view[start:end]) for start, end in wire.payload_ranges(len(view)))
        self._push(messages, timeout=DEADLINE_SECONDS)

    def pull(self) -> None:
        copy_in(self._buffer, self._pull(b".", timeout=DEADLINE_SECONDS))


class TcpPath:
    def __init__(self, port: int, buffer: Buffer) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._view = buffer.view

    def close(self) -> None:
        self._connection.close()

    def push(self) -> None:
        self._connection.sendall(_PUSH)
        self._connection.sendall(self._view)
        self._connection.recv(1)

    def pull(self) -> None:
        self._connection.sendall(_PULL)
        receive(self._connection, self._view)


PATHS: dict[Kind, Callable[[int, Buffer], Path]] = {
    "ours": OurPath,
    "generated": GeneratedPath,
    "raw": RawPath,
    "tcp": TcpPath,
}


def _expect(num_chunks: int, buffer: Buffer) -> None:
    if num_chunks != len(buffer.chunks):
        raise RuntimeError(f"{num_chunks} chunks arrived, {len(buffer.chunks)} were sent")


def main(kind: Kind, num_bytes: int, certs: FilePath | None = None) -> None:
    torch.set_num_threads(1)
    network = rpc.PLAIN if certs is None else rpc.Network(Tls.in_folder(certs, "shard"))
    port, alive = start_server(kind, Buffer(num_bytes), network)
    serve({"port": port})
    del alive


if __name__ == "__main__":
    main(cast(Kind, sys.argv[1]), int(sys.argv[2]), *map(FilePath, sys.argv[3:]))
