"""The status page: one page, its figures as JSON, and run control for who has the token. Plain HTTP, so loopback by default.

A server of its own, beside `/metrics`: who may scrape need not be who may look, and neither waits for the other. A connection
carries one request, has a few seconds for all of it, and there are so many at a time.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import socketserver
import sys
import threading
import time
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from coordinator.core.steering import BODY_BYTES_MAX, HEADER, Attempt, Outcome, Steering, Verdict, is_named_rightly
from coordinator.shell import Coordinator
from coordinator.status import json_of
from shardlane.errors import NotReadyError, UserError
from shardlane.flags import is_loopback
from shardlane.logs import logger
from shardlane.metrics import Metrics
from shardlane.secret_file import read_secret

CONNECTIONS_MAX = 64
REQUEST_SECONDS = 10.0  # for a whole request to come
ANSWER_SECONDS = 10.0  # for its answer to be taken
FRESH_SECONDS = 0.25  # that figures are handed out again, however many look
_DRAINED_BYTES_MAX = 1 << 16  # of a refused body: a connection closed with bytes unread is reset, and the answer lost
_WEB = Path(__file__).parent / "web"
_TEXT = "text/plain; charset=utf-8"
_ALLOWED = {"/": "GET", "/status.json": "GET", "/control": "POST"}
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class StatusPage:
    """Bound when it is made, serves from `start` on."""

    def __init__(self, bind: str, metrics: Metrics, *, token_file: Path | None = None, is_insecure: bool = False) -> None:
        """Raises `UserError` for an address that cannot be bound, a token that cannot be read or would travel openly."""
        host, _, port = bind.rpartition(":")
        if not port.isdigit() or int(port) > 65_535:
            raise UserError(
                f"cannot serve the status page on {bind!r}: expected host:port, such as 127.0.0.1:0 for any free port"
            )
        if token_file is not None:
            read_secret(token_file)
            if not (is_loopback(bind) or is_insecure):
                raise UserError(
                    f"--status-bind {bind} can be reached from other machines, and the control token would travel in plain text;"
                    " bind 127.0.0.1, behind a proxy that speaks TLS if need be, or add --insecure"
                )
        self._steering = Steering()
        self._token_file = token_file
        self._lock = threading.Lock()
        self._figures, self._figures_seconds = b"", 0.0
        self._coordinator: Coordinator | None = None
        self._log = logger(role="coordinator")
        help = "Attempts to steer the run by the status page."
        self._attempts = metrics.counter("shardlane_coordinator_control_attempts_total", help, ("outcome",))
        for outcome in Outcome:
            self._attempts.labels(outcome.value)  # a rate needs the zero before the first one
        self.is_loopback = is_loopback(bind)
        try:
            self._http = _Http((host.strip("[]"), int(port)), self)
        except OSError as error:
            raise UserError(
                f"cannot serve the status page on {bind}: {error.strerror}; free the port, or give another one"
            ) from error
        self.port = int(self._http.server_address[1])

    def start(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        threading.Thread(target=self._http.serve_forever, args=(0.1,), name="status", daemon=True).start()

    def close(self) -> None:
        if self._coordinator is not None:
            self._http.shutdown()
        self._http.server_close()

    @property
    def has_control(self) -> bool:
        return self._token_file is not None

    def figures(self) -> bytes:
        """JSON, at most `FRESH_SECONDS` old."""
        assert self._coordinator is not None
        with self._lock:
            if time.monotonic() - self._figures_seconds > FRESH_SECONDS or not self._figures:
                self._figures, self._figures_seconds = json_of(self._coordinator), time.monotonic()
            return self._figures

    def steer(self, attempt: Attempt, peer: str) -> Verdict:
        assert self._coordinator is not None
        with self._lock:
            verdict = self._steering.judge(attempt, self._token(), time.monotonic())
        self._attempts.labels(verdict.outcome.value).inc()
        if verdict.action is not None:
            self._coordinator.control(verdict.action)
            self._log.info("control accepted", action=verdict.action.value, peer=peer)
        elif verdict.outcome is not Outcome.TOO_MANY:  # so the log grows no faster than the allowance
            self._log.warning("control refused", outcome=verdict.outcome.value, peer=peer)
        return verdict

    def _token(self) -> bytes | None:
        """Read each time: a changed one holds at once, and without the file control is off."""
        try:
            return None if self._token_file is None else read_secret(self._token_file)
        except UserError:
            return None


@cache
def page() -> tuple[bytes, str]:
    """(HTML, Content-Security-Policy): style and script are in it, and nothing else may run or be fetched but from here."""
    html, style, script = (_WEB.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode(), policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, address: tuple[str, int], status_page: StatusPage) -> None:
        self.status_page = status_page
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Request)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service who we are, which can take seconds

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes away, or is too slow, is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Punctual(io.RawIOBase):
    """Reads a connection until a time."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._end_seconds = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(max(0.001, self._end_seconds - time.monotonic()))
        return self._connection.recv_into(buffer)


class _Request(BaseHTTPRequestHandler):
    """One, and its answer; `Connection: close` is HTTP/1.0's own way."""

    server: _Http

    def setup(self) -> None:
        self.connection = self.request
        self.rfile = io.BufferedReader(_Punctual(self.connection, REQUEST_SECONDS))
        self.wfile = self._whole = io.BytesIO()  # sent within `ANSWER_SECONDS`, however slowly it is taken

    def finish(self) -> None:
        self.connection.settimeout(ANSWER_SECONDS)
        self.connection.sendall(self._whole.getvalue())

    def do_GET(self) -> None:
        match self._path("GET"):
            case "/":
                html, policy = page()
                self._answer(HTTPStatus.OK, html, "text/html; charset=utf-8", {"Content-Security-Policy": policy})
            case "/status.json":
                control = "on" if self.server.status_page.has_control else "off"
                self._answer(HTTPStatus.OK, self.server.status_page.figures(), "application/json", {HEADER: control})

    def do_POST(self) -> None:
        if (body := self._body()) is None or self._path("POST") is None:
            return
        attempt = Attempt(
            has_header=HEADER in self.headers,
            origin=self.headers.get("Origin", ""),
            host=self.headers.get("Host", ""),
            authorization=self.headers.get("Authorization", ""),
            body=body,
        )
        try:
            verdict = self.server.status_page.steer(attempt, self.client_address[0])
        except NotReadyError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return
        body = json.dumps({"outcome": verdict.outcome.value, "reason": verdict.reason}).encode()
        self._answer(verdict.status, body, "application/json")

    def _other(self) -> None:
        self._path(self.command)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _other

    def _path(self, method: str) -> str | None:
        """The path, if it is one of ours that takes the method; else that is answered."""
        path = self.path.partition("?")[0]
        if not is_named_rightly(self.headers.get("Host", ""), is_loopback=self.server.status_page.is_loopback):
            self._say(HTTPStatus.MISDIRECTED_REQUEST, "this is no host of that name; ask for 127.0.0.1 or localhost")
        elif path not in _ALLOWED:
            self._say(HTTPStatus.NOT_FOUND, "here are /, /status.json and /control")
        elif _ALLOWED[path] != method:
            self._answer(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {_ALLOWED[path]}\n".encode(), _TEXT, {"Allow": _ALLOWED[path]}
            )
        else:
            return path
        return None

    def _body(self) -> bytes | None:
        """None: it is too large or of no length, and that is answered."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or "Transfer-Encoding" in self.headers:
            self._say(HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length")
        elif len(length) > 9 or int(length) > BODY_BYTES_MAX:
            self.rfile.read(min(int(length[:9]), _DRAINED_BYTES_MAX))
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {BODY_BYTES_MAX} bytes")
        else:
            return self.rfile.read(int(length))
        return None

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, f"{text}\n".encode(), _TEXT)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "Shardlane"

    def log_message(self, format: str, *args: object) -> None:
        """That somebody looks is no news."""
