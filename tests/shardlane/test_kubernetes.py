"""Certificates in Kubernetes Secrets, against a server that speaks, over TLS, the part of the API that is used."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from shardlane.certificates import Authority
from shardlane.cli.__main__ import main
from shardlane.errors import UnreachableError, UserError
from shardlane.kubernetes import ANSWER_BYTES_MAX, ConflictError, SecretStore, fill_join_secret, fill_secrets
from shardlane.secret_file import read_secret
from shardlane.tls import ROLES, Tls, name_of

JOIN = "shardlane-join"
NAMES = ["shardlane-authority", *(f"shardlane-{role}-tls" for role in ROLES)]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
PATH = "/api/v1/namespaces/training/secrets/"


class ApiServer:
    """Holds Secrets; `before_update` is called with a name before each update, `answer` replaces what it would say."""

    def __init__(self, folder: Path) -> None:
        self.secrets: dict[str, dict[str, str]] = {name: {} for name in (*NAMES, JOIN)}
        self.versions = dict.fromkeys(self.secrets, 1)
        self.calls: list[str] = []
        self.before_update: Callable[[str], None] = lambda name: None
        self.answer: tuple[int, bytes] | None = None
        authority = Authority.new()
        certificate, key = authority.issue(["localhost"], days=1)
        for name, content in {"ca.crt": authority.pem, "server.crt": certificate, "server.key": key}.items():
            (folder / name).write_bytes(content)
        (folder / "token").write_text("the-token\n")
        (folder / "namespace").write_text("training")
        self._http = ThreadingHTTPServer(("localhost", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBERNETES_SERVICE_HOST": "localhost", "KUBERNETES_SERVICE_PORT": str(self._http.server_address[1])}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def reply(self, method: str, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, bytes]:
        name = path.removeprefix(PATH)
        self.calls.append(f"{method} {name}")
        if self.answer is not None:
            return self.answer
        if token != "Bearer the-token":
            return self.status(401, "Unauthorized")
        if name not in self.secrets:
            return self.status(404, f'secrets "{name}" not found')
        if method == "PATCH":
            self.before_update(name)
            if body["metadata"]["resourceVersion"] != str(self.versions[name]):
                return self.status(409, "the object has been modified")
            self.put(name, body["data"])
        metadata = {"name": name, "resourceVersion": str(self.versions[name])}
        return 200, json.dumps({"kind": "Secret", "metadata": metadata, "data": self.secrets[name] or None}).encode()

    def put(self, name: str, data: dict[str, str]) -> None:
        self.secrets[name] |= data
        self.versions[name] += 1

    def status(self, code: int, message: str) -> tuple[int, bytes]:
        return code, json.dumps({"kind": "Status", "message": message, "code": code}).encode()

    def read(self, name: str) -> dict[str, bytes]:
        return {key: base64.b64decode(value) for key, value in self.secrets[name].items()}

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply({})

            def do_PATCH(self) -> None:
                assert self.headers["Content-Type"] == "application/merge-patch+json"
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _reply(self, body: dict[str, Any]) -> None:
                code, content = server.reply(self.command, self.path, self.headers["Authorization"], body)
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    made = ApiServer(tmp_path)
    yield made
    made.close()


@pytest.fixture
def store(server: ApiServer, tmp_path: Path) -> SecretStore:
    return SecretStore.of_pod(server.environment, tmp_path)


def fill(store: SecretStore, now: datetime = NOW) -> list[str]:
    return fill_secrets(store, "shardlane", days=90, now=now)


def test_empty_secrets_are_filled_as_a_pod_mounts_them(server: ApiServer, store: SecretStore, tmp_path: Path) -> None:
    lines = fill(store)
    assert [line.partition(":")[0] for line in lines] == NAMES and lines[0] == "shardlane-authority: a new authority"
    assert lines[1] == "shardlane-coordinator-tls: a certificate good for 90 days, for there was none"
    for role in ROLES:
        data = server.read(f"shardlane-{role}-tls")
        assert data.keys() == {"ca.crt", "tls.crt", "tls.key"}
        for key, content in data.items():
            (tmp_path / key).write_bytes(content)
        tls = Tls.of(*(str(tmp_path / key) for key in ("ca.crt", "tls.crt", "tls.key")))
        assert tls is not None and tls.server_credentials() is not None
        certificate = x509.load_pem_x509_certificate(data["tls.crt"])
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [name_of(role)]
        assert certificate.not_valid_after_utc == NOW + timedelta(days=90)
    assert len({server.read(name)["ca.crt"] for name in NAMES}) == 1


def test_what_is_good_stays(server: ApiServer, store: SecretStore) -> None:
    fill(store)
    before, server.calls = json.dumps(server.secrets), []
    assert fill(store, NOW + timedelta(days=59)) == []
    assert json.dumps(server.secrets) == before and server.calls == [f"GET {name}" for name in NAMES]


def test_with_a_third_of_their_time_left_they_are_made_anew_by_the_same_authority(server: ApiServer, store: SecretStore) -> None:
    fill(store)
    authority = server.read("shardlane-authority")
    lines = fill(store, NOW + timedelta(days=61))
    assert len(lines) == len(ROLES) and all(line.endswith("the old one ends soon") for line in lines)
    assert server.read("shardlane-authority") == authority and server.read("shardlane-shard-tls")["ca.crt"] == authority["ca.crt"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data | {"tls.crt": b""}, "there was none"),
        (lambda data: data | {"tls.key": b"nonsense"}, "what was there is no certificate with names, or no key"),
        (lambda data: data | {"tls.key": Authority.new().key_pem}, "the key was another one's"),
        (lambda data: data | {"ca.crt": b"another"}, "ca.crt was another one"),
        (lambda data: data | issued(Authority.new(), "worker"), "the old one was of another authority"),
    ],
)
def test_what_is_spoilt_is_made_anew(
    server: ApiServer, store: SecretStore, spoil: Callable[[dict[str, bytes]], dict[str, bytes]], reason: str
) -> None:
    fill(store)
    put(server, "shardlane-worker-tls", spoil(server.read("shardlane-worker-tls")))
    assert fill(store) == [f"shardlane-worker-tls: a certificate good for 90 days, for {reason}"]
    assert fill(store) == []


def test_a_certificate_of_another_role_is_made_anew(server: ApiServer, store: SecretStore) -> None:
    fill(store)
    authority = server.read("shardlane-authority")
    put(server, "shardlane-worker-tls", issued(Authority.of(authority["tls.crt"], authority["tls.key"], ""), "operator"))
    [line] = fill(store)
    assert line.endswith("the old one was not for worker.shardlane.internal")


def issued(authority: Authority, role: str) -> dict[str, bytes]:
    certificate, key = authority.issue([name_of(role)], days=90, now=NOW)
    return {"tls.crt": certificate, "tls.key": key}


def put(server: ApiServer, name: str, data: dict[str, bytes]) -> None:
    server.put(name, {key: base64.b64encode(value).decode() for key, value in data.items()})


def test_of_two_that_fill_at_once_the_first_is_followed(server: ApiServer, store: SecretStore) -> None:
    """Every update of the second one comes too late, by one whole run of the first."""
    once = []

    def first(name: str) -> None:
        if not once:
            once.append(name)
            fill(store)

    server.before_update = first
    assert fill(store) == []
    assert once == ["shardlane-authority"] and fill(store) == []


def test_a_secret_that_never_stays_as_it_was_is_given_up(server: ApiServer, store: SecretStore) -> None:
    server.before_update = lambda name: server.put(name, {}) if name != "shardlane-authority" else None
    with pytest.raises(ConflictError, match="the object has been modified"):
        fill(store)
    assert server.calls.count("PATCH shardlane-coordinator-tls") == 5


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((403, b'{"message": "secrets is forbidden"}'), r"\(403\): secrets is forbidden; give the ServiceAccount a Role"),
        ((404, b'{"message": "not found"}'), r"\(404\): not found; apply the manifests first"),
        ((503, b""), r"\(503\): without a reason; try again later"),
        ((500, b"<html>"), r"\(500\): <html>; try again later"),
        ((200, b"[]"), "is not a Secret"),
        ((200, b"{"), "is not a Secret"),
        ((200, b'{"metadata": {"name": "a", "resourceVersion": "1"}, "data": {"tls.crt": "%"}}'), "is not a Secret"),
        ((200, b" " * (ANSWER_BYTES_MAX + 1)), "is not a Secret"),
    ],
)
def test_what_the_api_server_says_instead_is_one_line(
    server: ApiServer, store: SecretStore, answer: tuple[int, bytes], complaint: str
) -> None:
    server.answer = answer
    with pytest.raises(UserError, match=complaint) as caught:
        fill(store)
    assert "\n" not in str(caught.value)


def test_half_an_authority_is_not_replaced(server: ApiServer, store: SecretStore) -> None:
    """Its certificates would be refused by all that have those of the old one."""
    fill(store)
    server.put("shardlane-authority", {"tls.key": ""})
    with pytest.raises(UserError, match=r"the Secret shardlane-authority has no whole authority in tls\.crt and tls\.key"):
        fill(store)


def test_a_token_of_somebody_else_and_another_authority_are_refused(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another")
    with pytest.raises(UserError, match=r"\(401\): Unauthorized; is the ServiceAccount still there"):
        fill(SecretStore.of_pod(server.environment, tmp_path))
    (tmp_path / "ca.crt").write_bytes(Authority.new().pem)
    with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        fill(SecretStore.of_pod(server.environment, tmp_path))
    assert server.calls == ["GET shardlane-authority"], "the token is not shown to whom nobody vouches for"


def test_who_is_not_in_a_pod_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="expected to run in a pod"):
        SecretStore.of_pod({}, tmp_path)
    with pytest.raises(UserError, match="No such file or directory; mount the token"):
        SecretStore.of_pod({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path / "nowhere")
    assert main(["certs"]) == 2 and main(["certs", str(tmp_path), "--kubernetes-secrets", "shardlane"]) == 2
    assert capsys.readouterr().err == "shardlane: give a folder, or --kubernetes-secrets, and not both\n" * 2
    assert main(["certs", str(tmp_path), "--join-secret-only"]) == 2
    assert "--join-secret-only is for --kubernetes-secrets" in capsys.readouterr().err


def test_the_command_says_what_it_has_done(
    store: SecretStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SecretStore, "of_pod", lambda: store)
    assert main(["certs", "--kubernetes-secrets", "shardlane", "--days", "30"]) == 0
    out = capsys.readouterr().out
    assert out.count("a certificate good for 30 days, for there was none") == len(ROLES)
    assert out.endswith("shardlane-join: a new secret for join tokens\n")
    assert main(["certs", "--kubernetes-secrets", "shardlane"]) == 0
    assert capsys.readouterr().out == "shardlane: the certificates of coordinator, shard, worker, operator are good\n"


def test_other_keys_of_a_secret_stay(server: ApiServer, store: SecretStore) -> None:
    server.put("shardlane-shard-tls", {"notes": base64.b64encode(b"mine").decode()})
    fill(store)
    assert store.read("shardlane-shard-tls").data["notes"] == b"mine"


# ---- the secret for join tokens ---------------------------------------------------------------------------------------------


def test_the_join_secret_is_made_once_and_is_one_that_processes_start_with(
    server: ApiServer, store: SecretStore, tmp_path: Path
) -> None:
    assert fill_join_secret(store, "shardlane") == ["shardlane-join: a new secret for join tokens"]
    made = server.read(JOIN)
    assert made.keys() == {"join.secret"}
    (tmp_path / "join.secret").write_bytes(made["join.secret"])
    assert len(read_secret(tmp_path / "join.secret")) == 64
    assert fill_join_secret(store, "shardlane") == [] and server.read(JOIN) == made
    put(server, JOIN, {"join.secret": b"\n"})
    assert fill_join_secret(store, "shardlane") and server.read(JOIN)["join.secret"] != made["join.secret"], "emptied, a new one"


def test_of_two_join_secrets_the_first_stays(server: ApiServer, store: SecretStore) -> None:
    """The other one's pods may have started with it."""
    server.before_update = lambda name: put(server, name, {"join.secret": b"a" * 64})
    assert fill_join_secret(store, "shardlane") == []
    assert server.read(JOIN) == {"join.secret": b"a" * 64}


def test_a_person_s_join_secret_stays_and_one_that_is_too_short_is_told(server: ApiServer, store: SecretStore) -> None:
    put(server, JOIN, {"join.secret": b"b" * 32})
    assert fill_join_secret(store, "shardlane") == []
    put(server, JOIN, {"join.secret": b"short\n"})
    with pytest.raises(UserError, match=r"join\.secret of the Secret shardlane-join has 5 bytes; expected 32 at least; empty it"):
        fill_join_secret(store, "shardlane")


def test_beside_cert_manager_no_other_secret_is_touched(
    server: ApiServer, store: SecretStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SecretStore, "of_pod", lambda: store)
    for _ in range(2):
        assert main(["certs", "--kubernetes-secrets", "shardlane", "--join-secret-only"]) == 0
    first, again = capsys.readouterr().out.splitlines()
    assert first == "shardlane-join: a new secret for join tokens"
    assert again == "shardlane: the secret for join tokens is there"
    assert server.calls == [f"GET {JOIN}", f"PATCH {JOIN}", f"GET {JOIN}"]
