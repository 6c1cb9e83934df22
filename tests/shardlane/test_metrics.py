"""Instruments: exact sample names, one registry a service, and calls counted by go-grpc-prometheus's names and codes."""

from __future__ import annotations

import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from shardlane import rpc
from shardlane.errors import MalformedError, UserError
from shardlane.metrics import Metrics

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
Request, Response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse


class Servicer:
    """What it does is the request's service name."""

    def Check(self, request: Any, context: Any) -> Any:
        match request.service:
            case "refused":
                raise MalformedError("a bad offset")
            case "aborted":
                context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
            case "set":
                context.set_code(grpc.StatusCode.DATA_LOSS)
            case "bug":
                raise ZeroDivisionError
        return Response()

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        yield Response()
        yield Response()
        if request.service == "refused":
            raise MalformedError("a bad offset")
        while request.service == "endless":
            time.sleep(0.01)
            yield Response()

    def List(self, request: Any, context: Any) -> Any:
        return health_pb2.HealthListResponse()


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics("shard")
    yield made
    made.close()


@pytest.fixture
def stubs(metrics: Metrics) -> Iterator[rpc.Client]:
    """Not an `rpc.Server`, which has a health service of its own."""
    server = grpc.server(ThreadPoolExecutor(4), handlers=[rpc.handler(SERVICE, Servicer(), observer=metrics.observer)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with rpc.connect(f"127.0.0.1:{port}") as channel:
        yield rpc.Client(channel, SERVICE)
    server.stop(0).wait()


def text_of(metrics: Metrics, query: str = "") -> str:
    port = metrics.serve("127.0.0.1:0")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics{query}") as answer:
            return str(answer.read().decode())
    finally:
        metrics.close()


def value(metrics: Metrics, name: str, method: str, **labels: str) -> float | None:
    common = {"grpc_service": SERVICE.full_name, "grpc_method": method}
    kind = {"Check": "unary", "Watch": "server_stream"}[method]
    return metrics.registry.get_sample_value(name, {**common, "grpc_type": kind, **labels})


def eventually(read: Callable[[], float | None], expected: float) -> None:
    """A server ends a call a moment after the client has its answer."""
    for _ in range(200):
        if read() == expected:
            return
        time.sleep(0.02)
    assert read() == expected


def test_the_page_has_exactly_these_names(metrics: Metrics) -> None:
    metrics.counter("shardlane_shard_pushed_bytes_total", "Bytes.", ("dtype",)).labels("fp32").inc(7)
    metrics.gauge("shardlane_shard_version", "Version.").set_function(lambda: 3)
    metrics.histogram("shardlane_shard_apply_seconds", "Apply.", buckets=(0.5, 1.0)).observe(0.7)
    text = text_of(metrics)
    for line in (
        'shardlane_build_info{role="shard",version="0.1.0"} 1.0',
        'shardlane_shard_pushed_bytes_total{dtype="fp32"} 7.0',
        "shardlane_shard_version 3.0",
        'shardlane_shard_apply_seconds_bucket{le="0.5"} 0.0',
        'shardlane_shard_apply_seconds_bucket{le="1.0"} 1.0',
        "shardlane_shard_apply_seconds_count 1.0",
    ):
        assert f"\n{line}\n" in text, line
    assert "process_resident_memory_bytes" in text and "python_info" in text
    assert "_created" not in text


def test_a_page_of_named_instruments_has_no_others(metrics: Metrics) -> None:
    for name in ("version", "chunks", "sum_bytes"):
        metrics.gauge(f"shardlane_shard_{name}", "A gauge.").set(3)
    lines = text_of(metrics, "?name[]=shardlane_shard_version&name[]=shardlane_shard_chunks&name[]=none").splitlines()
    assert {line for line in lines if not line.startswith("#")} == {"shardlane_shard_version 3.0", "shardlane_shard_chunks 3.0"}


def test_two_services_of_one_process_do_not_add_up(metrics: Metrics) -> None:
    other = Metrics("shard")
    for each in (metrics, other):
        each.counter("shardlane_shard_pushed_bytes_total", "Bytes.").inc(5)
    assert metrics.registry.get_sample_value("shardlane_shard_pushed_bytes_total") == 5


@pytest.mark.parametrize(
    "name", ["pushed_bytes_total", "shardlane_total", "shardlane_shard_Bytes_total", "shardlane_shard_bytes"]
)
def test_a_counter_of_another_name_is_a_bug(metrics: Metrics, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        metrics.counter(name, "Bytes.")


@pytest.mark.parametrize(
    ("what", "code"),
    [("", "OK"), ("refused", "InvalidArgument"), ("aborted", "NotFound"), ("set", "DataLoss"), ("bug", "Unknown")],
)
def test_a_unary_call_is_counted_with_its_code(stubs: rpc.Client, metrics: Metrics, what: str, code: str) -> None:
    assert value(metrics, "grpc_server_handled_total", "Check", grpc_code="OK") == 0  # before the first call
    try:
        stubs.Check(Request(service=what), timeout=5)
    except grpc.RpcError:
        assert code != "OK"
    eventually(lambda: value(metrics, "grpc_server_handled_total", "Check", grpc_code=code), 1)
    assert value(metrics, "grpc_server_started_total", "Check") == 1
    assert value(metrics, "grpc_server_msg_received_total", "Check") == 1
    assert value(metrics, "grpc_server_handling_seconds_count", "Check") == 1
    assert value(metrics, "grpc_server_msg_sent_total", "Check") == (1 if what in ("", "set") else 0)


@pytest.mark.parametrize(("what", "code"), [("", "OK"), ("refused", "InvalidArgument")])
def test_a_stream_is_counted_message_by_message(stubs: rpc.Client, metrics: Metrics, what: str, code: str) -> None:
    answers = stubs.Watch(Request(service=what), timeout=5)
    assert next(answers) == next(answers) == Response()
    with nullcontext() if code == "OK" else pytest.raises(grpc.RpcError):
        assert list(answers) == []
    eventually(lambda: value(metrics, "grpc_server_handled_total", "Watch", grpc_code=code), 1)
    assert value(metrics, "grpc_server_msg_sent_total", "Watch") == 2


def test_a_client_that_leaves_is_canceled(stubs: rpc.Client, metrics: Metrics) -> None:
    answers = stubs.Watch(Request(service="endless"), timeout=30)
    next(answers)
    answers.cancel()
    eventually(lambda: value(metrics, "grpc_server_handled_total", "Watch", grpc_code="Canceled"), 1)


def test_a_deadline_that_passes_is_told_apart(stubs: rpc.Client, metrics: Metrics) -> None:
    with pytest.raises(grpc.RpcError):
        list(stubs.Watch(Request(service="endless"), timeout=0.3))
    eventually(lambda: value(metrics, "grpc_server_handled_total", "Watch", grpc_code="DeadlineExceeded"), 1)


def test_requests_of_a_client_stream_are_counted_as_they_are_read(metrics: Metrics) -> None:
    class Context:
        def code(self) -> None: ...

    behaviour = metrics.observer("stream_unary", "a.B", "Push", lambda requests, context: [next(requests), next(requests)])
    assert behaviour(iter("abc"), Context()) == ["a", "b"]
    labels = {"grpc_type": "client_stream", "grpc_service": "a.B", "grpc_method": "Push"}
    assert metrics.registry.get_sample_value("grpc_server_msg_received_total", labels) == 2
    assert metrics.registry.get_sample_value("grpc_server_handled_total", {**labels, "grpc_code": "OK"}) == 1


def test_health_is_told_by_status(metrics: Metrics) -> None:
    is_healthy = True
    port = metrics.serve("127.0.0.1:0", lambda: is_healthy)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
        assert answer.status == 200
    is_healthy = False
    for path, status in (("/healthz", 503), ("/elsewhere", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}")
        caught.value.close()
        assert caught.value.code == status


def test_a_port_in_use_is_the_users_error(metrics: Metrics) -> None:
    in_use = r"cannot serve metrics on 127\.0\.0\.1:\d+: Address already in use"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=in_use):
        metrics.serve(f"127.0.0.1:{taken.getsockname()[1]}")
    for bind in ("nonsense", "127.0.0.1:99999"):
        with pytest.raises(UserError, match="host:port"):
            metrics.serve(bind)
    assert metrics.serve("127.0.0.1:0") > 0  # and can still serve


def test_a_scraper_that_goes_away_is_no_news(metrics: Metrics, capfd: pytest.CaptureFixture[str]) -> None:
    asked, gone, answering = threading.Event(), threading.Event(), list[threading.Thread]()

    def is_healthy() -> bool:
        answering.append(threading.current_thread())
        asked.set()
        return gone.wait(10)

    port = metrics.serve("127.0.0.1:0", is_healthy)
    with socket.create_connection(("127.0.0.1", port)) as scraper:
        scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets the connection
        scraper.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert asked.wait(10)
    gone.set()
    answering[0].join(10)
    assert not answering[0].is_alive()
    assert capfd.readouterr().err == ""
