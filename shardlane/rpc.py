"""Channels, servers, deadlines, retries, and the one table between errors and gRPC statuses.

Sync gRPC with threads: measured three times as fast as `grpc.aio` for tensors. A waiting call holds a thread, so calls that
wait, calls that stream and calls that must never wait get thread pools of their own.
"""

from __future__ import annotations

import json
import socket
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardlane import wire
from shardlane.errors import (
    ForbiddenError,
    IncompatibleError,
    MalformedError,
    NotReadyError,
    RequestError,
    StaleError,
    TooLargeError,
    UnreachableError,
    UserError,
)
from shardlane.tls import ROLES, Tls, check_caller, name_of

KEEPALIVE_SECONDS = 10  # both ends derive from it: a client that pings more often than its server allows is cut off
CONTROL_DEADLINE_SECONDS = 10.0
WAIT_SECONDS = 30.0  # the longest that a server holds a call that waits

REASON_BYTES_MAX = 1024

_EVERY_ADDRESS = ("", "0.0.0.0", "[::]")
_MIB = 1 << 20
_TUNING: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", wire.MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", wire.MESSAGE_BYTES_MAX),
    ("grpc.http2.max_frame_size", 16 * _MIB - 1),
    ("grpc.http2.lookahead_bytes", 64 * _MIB),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.write_buffer_size", 4 * _MIB),
    ("grpc.tcp_read_chunk_size", 4 * _MIB),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 * _MIB),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 * _MIB),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    # of a host that was replaced under its old name the new address is asked for soon, not after gRPC's 30 s
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]
_SERVER_OPTIONS = [
    *_TUNING,
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.http2.max_ping_strikes", 0),
]

_STATUS: list[tuple[type[Exception], grpc.StatusCode]] = [
    (MalformedError, grpc.StatusCode.INVALID_ARGUMENT),
    (TooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StaleError, grpc.StatusCode.FAILED_PRECONDITION),
    (IncompatibleError, grpc.StatusCode.FAILED_PRECONDITION),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (NotReadyError, grpc.StatusCode.UNAVAILABLE),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (UserError, grpc.StatusCode.FAILED_PRECONDITION),
]

Observer = Callable[[str, str, str, Callable[..., Any]], Callable[..., Any]]
"""(kind such as "client_stream", full service name, method, behaviour) → the behaviour, watched (see `shardlane.metrics`)."""


def _retrying(attempts: int) -> str:
    """A service config: retry what never reached a server. Only for calls that invariant 1 makes harmless to repeat."""
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})


def connect(
    address: str, *, attempts: int = 1, own_connection: bool = False, tls: Tls | None = None, to: str = ""
) -> grpc.Channel:
    """A channel to `address`. `own_connection` keeps it apart from others there: heartbeats must not wait behind tensors. With
    `tls` whoever answers must have a certificate of role `to`.
    """
    options: list[tuple[str, Any]] = list(_TUNING)
    options += [("grpc.enable_retries", int(attempts > 1))]
    options += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000)]
    if attempts > 1:
        options.append(("grpc.service_config", _retrying(attempts)))
    if own_connection:
        options.append(("grpc.use_local_subchannel_pool", 1))
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    options.append(("grpc.ssl_target_name_override", name_of(to)))
    return grpc.secure_channel(address, tls.channel_credentials(), options=options)


def advertised(bind: str, advertise: str, port: int) -> str:
    """The host:port that peers are told: `advertise` as it is, or with `port` if it names a host alone; else the bound host.

    A server bound to every address is told by this machine's name.
    """
    if advertise.rpartition(":")[2].isdigit():
        return advertise
    host = advertise or bind.rpartition(":")[0]
    return f"{socket.gethostname() if host in _EVERY_ADDRESS else host}:{port}"


def advertised_metrics(bind: str, advertise: str, port: int) -> str:
    """The same for `/metrics`: a port in `advertise` is the gRPC server's, and only its host holds for both."""
    host, _, suffix = advertise.rpartition(":")
    return advertised(bind, host if suffix.isdigit() else advertise, port)


def _message_class(descriptor: Any) -> Any:
    return message_factory.GetMessageClass(descriptor)


def _serializers(descriptor: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """(serializer, deserializer) of a message type: `wire`'s for one with a payload, the generated ones otherwise."""
    message = _message_class(descriptor)
    if wire.has_payload(message):
        return wire.encode, wire.decoder(message)
    return message.SerializeToString, message.FromString


def _kind(method: MethodDescriptor) -> str:
    return f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"


class Client:
    """Callables for each method of a service, by name: `Client(channel, ps_pb2.DESCRIPTOR.services_by_name[...]).Pull(…)`.

    Messages with a payload are `wire.Framed`, the others generated classes.
    """

    def __init__(self, channel: grpc.Channel, service: ServiceDescriptor) -> None:
        for method in service.methods:
            encode, _ = _serializers(method.input_type)
            _, decode = _serializers(method.output_type)
            path = f"/{service.full_name}/{method.name}"
            call = getattr(channel, _kind(method))(path, request_serializer=encode, response_deserializer=decode)
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the service has no method {name}")


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turns a failed call into the error of a person's tree: `UnreachableError`, or `UserError` with the server's reason."""
    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            reason = f"{what} does not answer ({code.name.lower()}); is it running, and is the address right?"
            raise UnreachableError(reason) from error
        raise UserError(f"{what} refused: {details}") from error


def status_of(error: Exception) -> grpc.StatusCode | None:
    """The status that a peer gets for an error of ours; None: a bug, which keeps its traceback."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), None)


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that returns its error: gRPC never ends a stream whose deserializer has raised, and gives no reason."""

    def tolerant(data: bytes) -> Any:
        try:
            return decode(data)
        except MalformedError as error:
            return error
        except DecodeError as error:
            return MalformedError(f"not a protobuf message: {error}")

    return tolerant


def _sound(message: Any) -> Any:
    if isinstance(message, MalformedError):
        raise message
    return message


def reason_of(error: Exception) -> str:
    """What a peer is told, in at most `REASON_BYTES_MAX`. It may quote the peer's own message, of whatever length: gRPC travels a
    reason as a header, with three bytes for each that is not ASCII, and drops the whole answer if its headers exceed 8 KiB.
    """
    return str(error)[:REASON_BYTES_MAX].encode()[:REASON_BYTES_MAX].decode(errors="ignore")


def _abort(error: Exception, context: grpc.ServicerContext) -> None:
    status = status_of(error)
    if status is not None:
        context.abort(status, reason_of(error))


def _guarded(behaviour: Callable[..., Any], kind: str, check: Callable[[grpc.ServicerContext], None]) -> Callable[..., Any]:
    """Turns our errors into statuses; an unknown one stays gRPC's UNKNOWN with its traceback in the log. `check` comes first."""
    sound = _sound if kind.startswith("unary") else lambda pieces: map(_sound, pieces)

    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            check(context)
            return behaviour(sound(request), context)
        except (RequestError, UserError) as error:
            _abort(error, context)

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            check(context)
            yield from behaviour(sound(request), context)
        except (RequestError, UserError) as error:
            _abort(error, context)

    return stream if kind.endswith("stream") else unary


def handler(
    service: ServiceDescriptor,
    servicer: object,
    *,
    pools: Mapping[str, ThreadPoolExecutor] | None = None,
    observer: Observer | None = None,
    callers: Mapping[str, Collection[str]] | None = None,
) -> grpc.GenericRpcHandler:
    """Routes a service's methods to `servicer`'s methods of the same names. `pools`: a method's own thread pool, by name;
    `callers`: the roles of certificates that may call it, all where it is not named.
    """
    methods = {}
    for method in service.methods:
        _, decode = _serializers(method.input_type)
        encode, _ = _serializers(method.output_type)
        kind = _kind(method)
        allowed = (callers or {}).get(method.name, ROLES)
        behaviour = _guarded(getattr(servicer, method.name), kind, partial(check_caller, method=method.name, allowed=allowed))
        if observer is not None:
            behaviour = observer(kind, service.full_name, method.name, behaviour)
        if pools and method.name in pools:
            behaviour.experimental_thread_pool = pools[method.name]  # type: ignore[attr-defined]
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        methods[method.name] = make(behaviour, request_deserializer=_tolerant(decode), response_serializer=encode)
    return grpc.method_handlers_generic_handler(service.full_name, methods)


class Server:
    """A gRPC server with health checking and reflection. `port` is the one that was bound (0 asks for any free one)."""

    def __init__(
        self,
        bind: str,
        handlers: Mapping[str, grpc.GenericRpcHandler] | None = None,
        *,
        threads: int = 16,
        tls: Tls | None = None,
    ) -> None:
        """`handlers` by full service name; `add` gives more. Raises `UserError` if `bind` cannot be bound."""
        self._server = grpc.server(ThreadPoolExecutor(threads, thread_name_prefix="rpc"), options=_SERVER_OPTIONS)
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(4, thread_name_prefix="health")
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        for name, handler in (handlers or {}).items():
            self.add(name, handler)
        try:
            self.port: int = (
                self._server.add_insecure_port(bind)
                if tls is None
                else self._server.add_secure_port(bind, tls.server_credentials())
            )
        except RuntimeError as error:
            reason = "the port is in use, or the address is not this machine's"
            raise UserError(f"cannot listen on {bind}: {reason}; free it, or give another --bind") from error

    def add(self, name: str, handler: grpc.GenericRpcHandler) -> None:
        """One more service, before `start`."""
        self._server.add_generic_rpc_handlers((handler,))
        self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._names.append(name)

    def start(self) -> None:
        reflection.enable_server_reflection(self._names, self._server)
        self._server.start()

    def stop(self, grace_seconds: float = 1.0) -> None:
        """Refuses new calls, lets running ones end for `grace_seconds`, then cancels them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_seconds).wait(grace_seconds + 5.0)


@dataclass(frozen=True)
class Network:
    """How this process reaches others, and is reached: by mutual TLS, or in plain text."""

    tls: Tls | None = None

    @classmethod
    def of(cls, flags: Namespace) -> Network:
        """As a service's `--ssl-…` flags say it. Raises `UserError`."""
        return cls(Tls.of(flags.ssl_ca_certfile, flags.ssl_certfile, flags.ssl_keyfile))

    def connect(self, address: str, *, to: str, own_connection: bool = False) -> grpc.Channel:
        """`to`: the role of whom is meant."""
        return connect(address, own_connection=own_connection, tls=self.tls, to=to)

    def serve(self, bind: str, handlers: Mapping[str, grpc.GenericRpcHandler] | None = None) -> Server:
        return Server(bind, handlers, tls=self.tls)


PLAIN = Network()
