"""Mutual TLS: a cluster trains with it to the same bits, and whoever has no right certificate is refused."""

from __future__ import annotations

import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from shardlane import config as configs
from shardlane import rpc
from shardlane.certificates import JOIN_SECRET, Authority, write_certificates
from shardlane.cli.__main__ import main
from shardlane.config import Config
from shardlane.errors import UserError
from shardlane.ids import PROTOCOL_VERSION
from shardlane.pb import coordinator_pb2, ps_pb2, worker_pb2
from shardlane.prepare import ensure_prepared
from shardlane.tls import ROLES, Tls, caller_roles, name_of
from tests.cluster.threads import Cluster, digest_of, running, train_reference

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
SHAPE = ["--cluster.stages", "2", "--cluster.replicas", "1", "--cluster.shards", "2", "--validation.num_micro_batches", "0"]
COORDINATOR, SHARD, WORKER = (
    file.DESCRIPTOR.services_by_name[name]
    for file, name in ((coordinator_pb2, "Coordinator"), (ps_pb2, "ParameterShard"), (worker_pb2, "PipelineWorker"))
)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    write_certificates(folder, days=2)
    return folder


@pytest.fixture(scope="module")
def config() -> Config:
    return configs.load(TINY, [*SHAPE, "--train.max_steps", "4"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[Cluster]:
    """One that trains for as long as it is looked at."""
    endless = configs.load(TINY, [*SHAPE, "--train.max_steps", "1000000"])
    folder = tmp_path_factory.mktemp("run")
    ensure_prepared(endless, folder, lambda line: None)
    with running(endless, folder, network_of=lambda role: rpc.Network(Tls.in_folder(certs, role))) as made:
        yield made


def test_a_cluster_trains_to_the_same_bits_also_with_join_tokens(tmp_path: Path, certs: Path, config: Config) -> None:
    digest, _ = train_reference(config, ensure_prepared(config, tmp_path, lambda line: None))
    networks = lambda role: rpc.Network(Tls.in_folder(certs, role))  # noqa: E731
    with running(config, tmp_path, network_of=networks, join_secret_file=certs / JOIN_SECRET) as made:
        made.wait()
    assert digest_of(tmp_path) == digest


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


def get_run(channel: grpc.Channel) -> Callable[[], object]:
    return lambda: rpc.Client(channel, COORDINATOR).GetRun(coordinator_pb2.GetRunRequest(), timeout=20)


@pytest.mark.parametrize("who", ["in plain text", "without a certificate", "of another authority", "expired"])
def test_who_has_no_right_certificate_gets_no_connection(cluster: Cluster, certs: Path, tmp_path: Path, who: str) -> None:
    address, authority = cluster.coordinator.address, (certs / "ca.pem").read_bytes()
    options = [("grpc.ssl_target_name_override", name_of("coordinator"))]
    if who == "in plain text":
        channel = grpc.insecure_channel(address)
    elif who == "without a certificate":
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority), options)
    elif who == "of another authority":
        write_certificates(tmp_path, days=2)
        key, certificate = (tmp_path / "worker.key").read_bytes(), (tmp_path / "worker.pem").read_bytes()
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options)
    else:
        past = datetime.now(UTC) - timedelta(days=3)
        certificate, key = Authority.in_folder(certs).issue([name_of("worker")], days=1, now=past)
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options)
    with channel:
        code, _ = refusal(get_run(channel))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_a_role_may_call_what_is_its_own(cluster: Cluster, certs: Path) -> None:
    networks = {role: rpc.Network(Tls.in_folder(certs, role)) for role in ("worker", "shard", "operator")}
    with networks["worker"].connect(cluster.coordinator.address, to="coordinator") as channel:
        client = rpc.Client(channel, COORDINATOR)
        stop = coordinator_pb2.ControlRequest(action=coordinator_pb2.CONTROL_ACTION_STOP)
        code, details = refusal(lambda: client.Control(stop, timeout=20))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert details == "Control is for operator; the caller has a certificate of role worker"
        registration = coordinator_pb2.RegisterRequest(
            protocol_version=PROTOCOL_VERSION, role=coordinator_pb2.ROLE_SHARD, incarnation="shard-0", address="127.0.0.1:1"
        )
        code, details = refusal(lambda: client.Register(registration, timeout=20))
        assert (code, details) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "Register as shard is for shard; the caller has a certificate of role worker",
        )
    with networks["worker"].connect(cluster.shards[0].address, to="shard") as channel:
        code, details = refusal(lambda: rpc.Client(channel, SHARD).Deliver(iter(()), timeout=20))
        assert (code, details[:20]) == (grpc.StatusCode.PERMISSION_DENIED, "Deliver is for shard")
    with networks["operator"].connect(cluster.shards[0].address, to="shard") as channel:
        pull = lambda: list(rpc.Client(channel, SHARD).Pull(ps_pb2.PullRequest(), timeout=20))  # noqa: E731
        assert refusal(pull)[0] is grpc.StatusCode.PERMISSION_DENIED
    with networks["shard"].connect(cluster.workers[0].address, to="worker") as channel:
        code, _ = refusal(lambda: rpc.Client(channel, WORKER).Transfer(iter(()), timeout=20))
        assert code is grpc.StatusCode.PERMISSION_DENIED
    labels = {"grpc_method": "Pull", "grpc_code": "PermissionDenied"}
    samples = [each for family in cluster.shards[0].metrics.registry.collect() for each in family.samples]
    assert [
        each.value for each in samples if each.name == "grpc_server_handled_total" and labels.items() <= each.labels.items()
    ] == [1]


def test_a_certificate_of_no_role_may_call_nothing(cluster: Cluster, certs: Path, tmp_path: Path) -> None:
    certificate, key = Authority.in_folder(certs).issue(["somebody.example"], days=1)
    files = {"ca": (certs / "ca.pem").read_bytes(), "certificate": certificate, "key": key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    network = rpc.Network(Tls(*(tmp_path / name for name in files)))
    with network.connect(cluster.coordinator.address, to="coordinator") as channel:
        code, details = refusal(
            lambda: rpc.Client(channel, COORDINATOR).GetStatus(coordinator_pb2.GetStatusRequest(), timeout=20)
        )
    assert (code, details.partition(";")[2]) == (
        grpc.StatusCode.PERMISSION_DENIED,
        " the caller has a certificate without a role",
    )


class Connection:
    """What gRPC says of one."""

    def __init__(self, **found: list[bytes]) -> None:
        self._found = found

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._found


def test_without_any_name_a_certificate_is_still_none_of_plain_text() -> None:
    assert caller_roles(Connection(transport_security_type=[b"insecure"])) is None  # type: ignore[arg-type]
    assert caller_roles(Connection(transport_security_type=[b"ssl"])) == frozenset()  # type: ignore[arg-type]


def test_a_client_is_not_taken_in_by_a_server_of_another_role(cluster: Cluster, certs: Path) -> None:
    """A worker that answers at a shard's address is no shard."""
    with rpc.Network(Tls.in_folder(certs, "worker")).connect(cluster.workers[0].address, to="shard") as channel:
        code, _ = refusal(lambda: list(rpc.Client(channel, SHARD).Pull(ps_pb2.PullRequest(), timeout=20)))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_an_operator_looks_at_a_run_and_steers_it(cluster: Cluster, certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = cluster.coordinator.address
    for command in ("checkpoint", "status"):
        assert main([command, address, "--certs", str(certs)]) == 0
    assert main(["status", address]) == 2, "in plain text nobody answers"
    assert "does not answer" in capsys.readouterr().err


def test_renewed_certificates_are_taken_up_without_a_restart(cluster: Cluster, certs: Path) -> None:
    def serial() -> int:
        context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(certs / "operator.pem", certs / "operator.key")
        host, _, port = cluster.coordinator.address.rpartition(":")
        with context.wrap_socket(socket.create_connection((host, int(port)), timeout=20)) as connection:
            found = connection.getpeercert(binary_form=True)
        assert found is not None
        return x509.load_der_x509_certificate(found).serial_number

    before = serial()
    write_certificates(certs, days=3)
    end = time.monotonic() + 30
    while serial() == before:
        assert time.monotonic() < end
    version = cluster.coordinator.coordinator.run.version
    while cluster.coordinator.coordinator.run.version < version + 2:
        assert time.monotonic() < end, "the run goes on meanwhile"
        time.sleep(0.01)


def test_everybody_shows_when_its_certificate_runs_out(cluster: Cluster, certs: Path) -> None:
    """Of the files as they are now, which a test before this one may have renewed."""
    for member in (*cluster.shards, *cluster.workers):
        shown = member.metrics.registry.get_sample_value("shardlane_certificate_expiry_timestamp_seconds")
        assert shown == Tls.in_folder(certs, member.metrics.role).expiry() and 86400 < shown - time.time() < 4 * 86400


def test_the_first_of_a_chain_to_run_out_counts_and_the_last_of_authorities(tmp_path: Path) -> None:
    authority, now = Authority.new(), datetime.now(UTC)
    short, key = authority.issue([name_of("worker")], days=1, now=now)
    long, _ = authority.issue([name_of("worker")], days=9, now=now)
    ca, certificate, keyfile = (tmp_path / name for name in ("ca.pem", "worker.pem", "worker.key"))
    ca.write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    keyfile.write_bytes(key)
    certificate.write_bytes(long + short)
    tls = Tls(ca, certificate, keyfile)
    assert abs(tls.expiry() - (now + timedelta(days=1)).timestamp()) < 2
    certificate.write_bytes(long)
    assert abs(tls.expiry() - (now + timedelta(days=9)).timestamp()) < 2
    ca.write_bytes(short)  # as if it were an authority's
    assert abs(tls.expiry() - (now + timedelta(days=1)).timestamp()) < 2
    ca.write_bytes(short + authority.certificate.public_bytes(Encoding.PEM))
    assert abs(tls.expiry() - (now + timedelta(days=9)).timestamp()) < 2
    certificate.write_bytes(b"-----BEGIN nothing")
    assert math.isnan(tls.expiry())
    certificate.unlink()
    assert math.isnan(tls.expiry())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("ca.pem", "", ""), "--ssl-certfile, --ssl-keyfile is missing"),
        (("nowhere.pem", "worker.pem", "worker.key"), "cannot read the authority"),
    ],
)
def test_what_is_given_by_halves_is_refused(certs: Path, flags: tuple[str, str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Tls.of(*(str(certs / flag) if flag else "" for flag in flags))


def test_certs_makes_a_folder_and_keeps_keys_to_their_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certs", str(tmp_path)]) == 0
    authority = (tmp_path / "ca.pem").read_bytes()
    assert {file.stem for file in tmp_path.glob("*.pem")} == {"ca", *ROLES}
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.glob("*.key"))
    assert main(["certs", str(tmp_path), "--days", "3"]) == 0
    assert (tmp_path / "ca.pem").read_bytes() == authority, "an authority that is there is used again"
    os.truncate(tmp_path / "ca.key", 10)
    assert main(["certs", str(tmp_path)]) == 2
    assert "no whole authority" in capsys.readouterr().err
