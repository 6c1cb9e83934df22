"""The status page on real sockets: what it shows, who may steer, and who is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import status_page
from coordinator.core.events import RunState
from coordinator.core.steering import BURST, HEADER
from coordinator.status_page import CONNECTIONS_MAX, StatusPage, page
from shardlane.cli.__main__ import main
from shardlane.errors import UserError
from shardlane.metrics import Metrics
from tests.coordinator.cast import num_chunks
from tests.coordinator.page_client import TOKEN, Site, site
from tests.coordinator.test_service import until


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


def figures(run: Site) -> dict[str, Any]:
    answer = run.ask("GET", "/status.json")
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
    found: dict[str, Any] = json.loads(answer.body)
    return found


def test_the_page_is_whole_and_lets_nothing_else_in(run: Site) -> None:
    answer = run.ask("GET", "/")
    html, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    assert answer.status == 200 and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and not re.search(
        r"""(?:src|href)=["'](?!data:)|\burl\(|@import|\bhttps?://(?!www\.w3\.org)""", html
    )
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy
    assert "innerHTML" not in html and "style=" not in html and "onclick" not in html
    headers = answer.headers
    assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"], headers["Cache-Control"]) == (
        "nosniff",
        "DENY",
        "no-store",
    )
    assert headers["Server"] == "Shardlane", "not which Python this is"


def test_the_figures_are_those_of_shardlane_status(run: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", run.cluster.service.address, "--json"]) == 0
    by_status, by_page = json.loads(capsys.readouterr().out), figures(run)
    for found in (by_status, by_page):
        for each in (found, *found["members"]):
            for moving in ("unixSeconds", "leaseAgeSeconds", "goodput", "goodputTokensPerSecond"):
                each.pop(moving, None)
    assert by_page == by_status
    assert by_page["state"] == "RUN_STATE_TRAINING" and by_page["version"] == "2"
    assert [each["step"] for each in by_page["losses"]] == ["0", "1"]
    assert sum(each["primary"] for each in by_page["holdings"]) == num_chunks(run.cluster.config)
    texts = [event["text"] for event in by_page["events"]]
    assert texts[0].startswith("coordinator of term 1 has begun") and "shard-01 joined from shard1.local:50051" in texts
    assert any(text.startswith("plan 1.1: ") for text in texts)


def test_it_is_live(run: Site) -> None:
    assert figures(run)["version"] == "2"
    run.train(2, 3)
    until(lambda: figures(run)["version"] == "4")


def test_the_loss_curve_survives_a_restart(tmp_path: Path) -> None:
    with site(tmp_path) as before:
        losses = figures(before)["losses"]
    with site(tmp_path) as after:
        found = figures(after)
    assert found["losses"] == losses and len(losses) == 2
    assert found["events"][0]["text"] == "coordinator of term 2 has begun, at version 2"


def test_the_token_steers(run: Site) -> None:
    for action, state in (("pause", RunState.PAUSED), ("resume", RunState.TRAINING)):
        answer = run.steer(action, Origin=f"http://127.0.0.1:{run.page.port}")
        assert (answer.status, json.loads(answer.body)) == (200, {"outcome": "accepted", "reason": f"asked to {action}"})
        assert run.cluster.service.state is state
    assert run.attempts("accepted") == 2
    until(lambda: "asked to pause" in [event["text"] for event in figures(run)["events"]])


def test_who_has_no_right_token_is_refused_and_counted(run: Site, capfd: pytest.CaptureFixture[str]) -> None:
    for token in ("", "x", TOKEN[:-1], TOKEN + "0"):
        answer = run.steer("stop", token)
        assert (answer.status, json.loads(answer.body)["outcome"]) == (401, "wrong_token")
    assert run.attempts("wrong_token") == 4 and run.attempts("accepted") == 0
    assert run.cluster.service.state is RunState.TRAINING and not run.cluster.service.coordinator.run.requests


def test_another_site_is_refused(run: Site) -> None:
    good = {"Authorization": f"Bearer {TOKEN}"}
    without = run.ask("POST", "/control", b'{"action": "stop"}', **good)
    foreign = run.steer("stop", Origin="http://evil.example")
    assert (without.status, foreign.status, run.attempts("cross_site")) == (403, 403, 2)
    rebound = run.ask("GET", "/status.json", Host="evil.example")
    assert rebound.status == 421 and b"no host of that name" in rebound.body
    assert run.ask("OPTIONS", "/control").headers.get("Access-Control-Allow-Origin") is None


def test_a_flood_is_cut_down(run: Site) -> None:
    statuses = [run.steer("pause", "wrong").status for _ in range(BURST + 8)]
    assert statuses[:BURST] == [401] * BURST and 429 in statuses[BURST:]
    assert run.steer("pause").status == 200, "and locks nobody out"


def test_a_changed_token_holds_at_once(run: Site, tmp_path: Path) -> None:
    (tmp_path / "control.token").write_text("f" * 40)
    assert run.steer("pause").status == 401
    assert run.steer("pause", "f" * 40).status == 200
    (tmp_path / "control.token").unlink()
    assert run.steer("resume", "f" * 40).status == 403


def test_without_a_token_file_control_is_off(tmp_path: Path) -> None:
    with site(tmp_path, has_token=False) as run:
        assert run.ask("GET", "/status.json").headers[HEADER] == "off"
        answer = run.steer("stop")
        assert (answer.status, run.attempts("off")) == (403, 1) and b"--control-token-file" in answer.body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/control", 405),
        ("POST", "/status.json", 405),
        ("PUT", "/", 405),
        ("DELETE", "/control", 405),
        ("BREW", "/", 501),
        ("GET", "/metrics", 404),
        ("GET", "/page.js", 404),
        ("GET", "/../../../../etc/passwd", 404),
        ("GET", "/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "//etc/passwd", 404),
        ("POST", "/../control", 404),
    ],
)
def test_other_paths_and_methods_have_their_answers(run: Site, method: str, path: str, status: int) -> None:
    answer = run.ask(method, path, b"" if method == "POST" else None)
    assert answer.status == status and b"root:" not in answer.body
    if status == 405:
        assert answer.headers["Allow"] in ("GET", "POST")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 1025\r\n\r\n" + b" " * 1025, 413),
        (b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (b"Content-Length: -1\r\n\r\n", 411),
        (b"\r\n", 411),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"X: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"X: x\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_bodies_and_heads_are_bounded(run: Site, monkeypatch: pytest.MonkeyPatch, head: bytes, status: int) -> None:
    monkeypatch.setattr(status_page, "REQUEST_SECONDS", 1.0)  # who announces more than comes is not waited for for long
    said = run.say(b"POST /control HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n" + head)
    assert said.startswith(b"HTTP/1.0 %d " % status) or (status == 413 and said == b""), said[:200]
    assert run.cluster.service.state is RunState.TRAINING


def test_slow_clients_hold_up_nobody_and_are_cut_off(run: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are places: they get no further, and /healthz, /metrics and calls do not notice."""
    port = run.metrics.serve("127.0.0.1:0", lambda: True)
    slow = [socket.create_connection(("127.0.0.1", run.page.port), timeout=30) for _ in range(CONNECTIONS_MAX + 4)]
    try:
        for connection in slow[:CONNECTIONS_MAX]:
            connection.sendall(b"GET /status.json HTTP/1.1\r\nHost: local")
        for path in ("/healthz", "/metrics"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                assert answer.status == 200
        assert run.cluster.status().version == 2
        assert [connection.recv(1) for connection in slow[CONNECTIONS_MAX:]] == [b""] * 4, "there is no place for them"
        monkeypatch.setattr(status_page, "REQUEST_SECONDS", 1.0)
        slow[0].sendall(b"host\r\n\r\n")
        assert slow[0].recv(12) == b"HTTP/1.0 200", "who finishes in time is answered"
    finally:
        for connection in slow:
            connection.close()
        run.metrics.close()
    until(lambda: _answers(run))


def _answers(run: Site) -> bool:
    try:
        return run.ask("GET", "/status.json").status == 200
    except ConnectionError:  # the places are not given back yet
        return False


def test_a_request_that_trickles_in_is_cut_off(run: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_page, "REQUEST_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", run.page.port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        connection.settimeout(0.05)
        for _ in range(200):  # a byte now and then renews nothing
            try:
                connection.sendall(b"x")
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    pytest.fail("it was never cut off")


def test_mistakes_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with pytest.raises(UserError, match="host:port"):
        StatusPage("nonsense", Metrics("coordinator"))
    with pytest.raises(UserError, match="cannot read the secret"):
        StatusPage("127.0.0.1:0", Metrics("coordinator"), token_file=tmp_path / "none")
    with pytest.raises(UserError, match="would travel in plain text"):
        StatusPage("0.0.0.0:0", Metrics("coordinator"), token_file=tmp_path / "token")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Address already in use"):
        StatusPage(f"127.0.0.1:{taken.getsockname()[1]}", Metrics("coordinator"))
    for options in ({"token_file": tmp_path / "token", "is_insecure": True}, {}):
        StatusPage("0.0.0.0:0", Metrics("coordinator"), **options).close()  # type: ignore[arg-type]


def test_the_page_fits_into_one_answer() -> None:
    assert len(page()[0]) < 64 << 10
