"""Prometheus instruments of one service, and their `/metrics`.

Each service has a registry of its own, so several live in one process without adding up. Names are
`shardlane_<service>_<what>_<unit>` in base units; of calls, those of go-grpc-prometheus, so that public dashboards work.
Labels are bounded: never a step, never an address.
"""

from __future__ import annotations

import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from shardlane import __version__
from shardlane.errors import UserError

disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` series beside each counter says nothing that we use

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_NAME = re.compile(r"shardlane_[a-z][a-z0-9]*(_[a-z0-9]+)+")
_TYPES = {
    "unary_unary": "unary",
    "stream_unary": "client_stream",
    "unary_stream": "server_stream",
    "stream_stream": "bidi_stream",
}
_CODES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode}  # as Go spells them
_CODES |= {grpc.StatusCode.OK: "OK", grpc.StatusCode.CANCELLED: "Canceled"}

Behaviour = Callable[..., Any]


class Metrics:
    """The instruments of one service; `role` is what it is, such as `shard`, `worker` or `coordinator`."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.registry = CollectorRegistry()
        self._http: _Http | None = None
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        build = Gauge("shardlane_build_info", "Always 1; the labels say what runs.", ("role", "version"), registry=self.registry)
        build.labels(role, __version__).set(1)
        self._calls = _Calls(self.registry)

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        """`name` is whole, and ends in `_total`."""
        if not name.endswith("_total"):
            raise ValueError(f"the counter {name} must end in _total")
        return Counter(_checked(name), help, labels, registry=self.registry)

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        """Better than setting one at every turn: `.set_function(read)` asks only when scraped."""
        return Gauge(_checked(name), help, labels, registry=self.registry)

    def histogram(
        self, name: str, help: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS_BUCKETS
    ) -> Histogram:
        return Histogram(_checked(name), help, labels, buckets=buckets, registry=self.registry)

    def watch_certificate(self, expiry: Callable[[], float]) -> None:
        """`expiry`: Unix time. For a process that has one."""
        name = "shardlane_certificate_expiry_timestamp_seconds"
        help = "When this process's certificate, or its authority's, runs out; NaN: it cannot be read."
        self.gauge(name, help).set_function(expiry)

    def observer(self, kind: str, service: str, method: str, behaviour: Behaviour) -> Behaviour:
        """An `rpc.Observer`: counts the calls of one method, their messages, codes and seconds."""
        return self._calls.watch(kind, service, method, behaviour)

    def serve(self, bind: str, is_healthy: Callable[[], bool] = lambda: True) -> int:
        """Answers `/metrics`, and `/healthz` with 200 or 503, on a thread; returns the port. Raises `UserError`."""
        if self._http is not None:
            raise ValueError("metrics are served already")
        host, _, port = bind.rpartition(":")
        if not port.isdigit() or int(port) > 65_535:
            raise UserError(f"cannot serve metrics on {bind!r}: expected host:port, such as 127.0.0.1:0 for any free port")
        try:
            self._http = _Http((host.strip("[]"), int(port)), self.registry, is_healthy)
        except OSError as error:
            raise UserError(f"cannot serve metrics on {bind}: {error.strerror}; free the port, or give another one") from error
        threading.Thread(target=self._http.serve_forever, args=(0.1,), name="metrics", daemon=True).start()
        return int(self._http.server_address[1])

    def close(self) -> None:
        """Stops serving; the instruments stay. Harmless when nothing is served."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the metric {name} is not called shardlane_<service>_<what>_<unit>")
    return name


class _Calls:
    """go-grpc-prometheus's server instruments."""

    def __init__(self, registry: CollectorRegistry) -> None:
        method = ("grpc_type", "grpc_service", "grpc_method")
        self._started = Counter("grpc_server_started_total", "Calls begun.", method, registry=registry)
        self._handled = Counter("grpc_server_handled_total", "Calls ended, by status.", (*method, "grpc_code"), registry=registry)
        self._received = Counter("grpc_server_msg_received_total", "Messages received.", method, registry=registry)
        self._sent = Counter("grpc_server_msg_sent_total", "Messages sent.", method, registry=registry)
        name, help = "grpc_server_handling_seconds", "Seconds from a call's begin to its end."
        self._seconds = Histogram(name, help, method, buckets=SECONDS_BUCKETS, registry=registry)

    def watch(self, kind: str, service: str, method: str, behaviour: Behaviour) -> Behaviour:
        labels = (_TYPES[kind], service, method)
        started, received, sent = (each.labels(*labels) for each in (self._started, self._received, self._sent))
        seconds = self._seconds.labels(*labels)
        self._handled.labels(*labels, "OK")  # a rate needs the zero before the first call
        streams_in, streams_out = (each == "stream" for each in kind.split("_"))

        def begin(request: Any) -> tuple[Any, float]:
            started.inc()
            if streams_in:
                return _Counted(request, received), time.perf_counter()
            received.inc()
            return request, time.perf_counter()

        def end(began: float, context: Any, completed: bool) -> None:
            seconds.observe(time.perf_counter() - began)
            self._handled.labels(*labels, _CODES[_status(context, completed)]).inc()

        def unary(request: Any, context: Any) -> Any:
            request, began = begin(request)
            completed = False
            try:
                response = behaviour(request, context)
                completed = True
                sent.inc()
                return response
            finally:
                end(began, context, completed)

        def stream(request: Any, context: Any) -> Iterator[Any]:
            request, began = begin(request)
            completed = False
            try:
                for response in behaviour(request, context):
                    sent.inc()
                    yield response
                completed = True
            finally:
                end(began, context, completed)

        return stream if streams_out else unary


class _Counted:
    """A request iterator that counts what it hands on."""

    def __init__(self, messages: Iterator[Any], counter: Counter) -> None:
        self._messages = messages
        self._counter = counter

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        message = next(self._messages)
        self._counter.inc()
        return message


def _status(context: Any, completed: bool) -> grpc.StatusCode:
    """How a call ended. An abort leaves its code in the context; a client that is gone leaves none, nor does a bug of ours."""
    code = context.code()
    if code is not None:
        return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
    if completed:
        return grpc.StatusCode.OK
    if context.is_active():
        return grpc.StatusCode.UNKNOWN
    return grpc.StatusCode.DEADLINE_EXCEEDED if context.time_remaining() == 0 else grpc.StatusCode.CANCELLED


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, is_healthy: Callable[[], bool]) -> None:
        self.registry = registry
        self.is_healthy = is_healthy
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Page)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that goes away before it has its answer is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service who we are, which can take seconds


class _Page(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a silent connection may hold its thread
    wbufsize = -1  # head and body leave together: apart, the second would wait for the acknowledgement of the first

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        match path:
            case "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                # `?name[]=…`, as every Prometheus client has it: who asks for one gauge often need not cost much
                names = parse_qs(query).get("name[]")
                registry = self.server.registry.restricted_registry(names) if names else self.server.registry
                self._answer(HTTPStatus.OK, encode(registry), content_type)
            case "/healthz":
                healthy = self.server.is_healthy()
                status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, b"ok\n" if healthy else b"not ready\n", "text/plain; charset=utf-8")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"here are /metrics and /healthz\n", "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""
