"""Join tokens over real gRPC, in plain text and with mutual TLS: who gets in, who does not, and what a restart remembers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.service import SERVICE, CoordinatorService
from shardlane import rpc, wire
from shardlane.certificates import JOIN_SECRET, write_certificates
from shardlane.cli.__main__ import main
from shardlane.credentials import Credential
from shardlane.errors import UserError
from shardlane.ids import PROTOCOL_VERSION, Incarnation, Version
from shardlane.join_token import VALID_SECONDS_MAX, mint
from shardlane.member import Beat, Membership
from shardlane.metrics import Metrics
from shardlane.pb import coordinator_pb2
from shardlane.plan import Role
from shardlane.secret_file import read_secret
from shardlane.tls import Tls
from tests.coordinator.cast import CPU, small_config, write_token_folder


class Setting:
    """A run's folder, its secret, and coordinators of it that come and go at one address."""

    def __init__(self, folder: Path, certs: Path, *, has_tls: bool) -> None:
        self.folder, self.certs, self.has_tls = folder, certs, has_tls
        self.secret_file = certs / JOIN_SECRET
        self.bind = "127.0.0.1:0"
        self.metrics = Metrics("coordinator")
        write_token_folder(folder / "data")

    def network(self, role: str) -> rpc.Network:
        return rpc.Network(Tls.in_folder(self.certs, role)) if self.has_tls else rpc.PLAIN

    @contextmanager
    def coordinator(self, *, secret_file: Path | None = None) -> Iterator[CoordinatorService]:
        self.metrics = Metrics("coordinator")
        service = CoordinatorService(
            small_config(cluster__lease_seconds=60.0),
            run_dir=self.folder,
            bind=self.bind,
            network=self.network("coordinator"),
            metrics=self.metrics,
            join_secret_file=secret_file or self.secret_file,
        )
        service.start()
        self.bind = service.address
        try:
            yield service
        finally:
            service.stop()

    def token(self, role: Role = "worker", *, valid_seconds: int = 600, secret: bytes = b"", nonce: str = "0" * 32) -> str:
        expires_seconds = int(time.time()) + valid_seconds
        return str(mint(secret or read_secret(self.secret_file), role=role, expires_seconds=expires_seconds, nonce=nonce))

    def register(self, token: str, *, incarnation: str = "worker-01", port: int = 1) -> coordinator_pb2.RegisterResponse:
        role: Role = "shard" if incarnation.startswith("shard") else "worker"
        request = coordinator_pb2.RegisterRequest(
            protocol_version=PROTOCOL_VERSION,
            role=wire.role_to_wire(role),
            incarnation=incarnation,
            address=f"{role}.local:{port}",
            numerics_class=CPU,
            join_token=token,
        )
        with self.network(role).connect(self.bind, to="coordinator") as channel:
            answer: coordinator_pb2.RegisterResponse = rpc.Client(channel, SERVICE).Register(request, timeout=20)
        return answer

    def refusal(self, token: str, **who: Any) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            self.register(token, **who)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
        return str(caught.value.details())  # type: ignore[attr-defined]

    def joins(self, outcome: str) -> float | None:
        return self.metrics.registry.get_sample_value("shardlane_coordinator_admissions_total", {"outcome": outcome})

    def membership(self, credential: Credential, incarnation: str = "worker-0a") -> Membership:
        return Membership(
            self.bind,
            role="worker",
            incarnation=Incarnation(incarnation),
            address="worker.local:7",
            numerics_class=CPU,
            network=self.network("worker"),
            credential=credential,
        )


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    write_certificates(folder, days=2)
    return folder


@pytest.fixture(params=["plain", "tls"])
def setting(request: pytest.FixtureRequest, tmp_path: Path, certs: Path) -> Setting:
    return Setting(tmp_path, certs, has_tls=request.param == "tls")


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def test_who_has_no_right_token_is_refused_with_the_reason_and_counted(setting: Setting) -> None:
    with setting.coordinator() as service:
        shown = {
            "missing": ("", "takes newcomers with a join token only"),
            "malformed": ("x" * 1000, "is no join token"),
            "forged": (setting.token(secret=b"another secret" * 3), "is not signed with this run's secret"),
            "expired": (setting.token(valid_seconds=-60), "expired 6"),
            "wrong_role": (setting.token("shard"), "is for a shard, and was shown by a worker"),
            "too_long": (setting.token(valid_seconds=VALID_SECONDS_MAX + 600), "more than 7 days"),
        }
        for outcome, (token, says) in shown.items():
            assert setting.joins(outcome) == 0
            assert says in setting.refusal(token)
            assert setting.joins(outcome) == 1
        assert service.coordinator.members == [] and setting.joins("admitted") == 0
        told = [event.text for event in service.coordinator.history.events if event.is_warning]
        assert len(told) == len(shown) and told[0].startswith("refused: this run takes newcomers with a join token only")


def test_a_replayed_token_is_refused_also_by_the_next_coordinator(setting: Setting) -> None:
    token = setting.token()
    with setting.coordinator():
        setting.register(token)
        assert setting.register(token).readmission, "the same process, whose answer was lost"
        for who in ({"incarnation": "worker-02", "port": 2}, {"incarnation": "worker-02"}):
            assert setting.refusal(token, **who) == "the join token was used by worker-01; each is good for one process"
        assert (setting.joins("admitted"), setting.joins("repeated"), setting.joins("replayed")) == (1, 1, 2)
    with setting.coordinator() as again:
        assert again.coordinator.members == [], "there was no plan yet, so the run begins anew; what was used stays used"
        assert "was used by worker-01" in setting.refusal(token, incarnation="worker-02", port=2)
        setting.register(token)
        assert (setting.joins("replayed"), setting.joins("repeated")) == (1, 1)


def test_a_readmission_outlives_token_and_coordinator_and_is_no_others(setting: Setting) -> None:
    with setting.coordinator():
        readmission = setting.register(setting.token(valid_seconds=3600)).readmission
    (setting.folder / "coordinator.sqlite").unlink()  # nothing is remembered
    with setting.coordinator() as again:
        assert "another process's" in setting.refusal(readmission, incarnation="worker-02")
        assert "another process's" in setting.refusal(readmission, port=2)
        setting.register(readmission)
        assert again.coordinator.members == ["worker-01"] and setting.joins("readmitted") == 1


def test_a_refused_registration_uses_nothing_up(setting: Setting) -> None:
    with setting.coordinator():
        with pytest.raises(grpc.RpcError) as caught:
            setting.register(setting.token(), incarnation="worker-not-hex")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        setting.register(setting.token())


def test_a_member_with_a_token_stays_whatever_becomes_of_the_coordinator(setting: Setting) -> None:
    """It is dropped, and its token has been used: the readmission brings it back."""
    with setting.coordinator() as service:
        membership = setting.membership(Credential(setting.token()))
        membership.register()
        membership.start(lambda: Beat(None, Version(0)), lambda plan: None, lambda reply: None)
        try:
            until(lambda: membership.state == coordinator_pb2.RUN_STATE_GATHERING)
            service.coordinator.run.members.drop(Incarnation("worker-0a"))
            until(lambda: service.coordinator.members == ["worker-0a"])
            assert setting.joins("readmitted") == 1
            service.stop()
            with setting.coordinator() as again:
                again.coordinator.run.members.drop(Incarnation("worker-0a"))
                until(lambda: again.coordinator.members == ["worker-0a"])
        finally:
            membership.stop()


def test_who_has_the_secret_starts_again_by_itself_also_with_a_new_one(setting: Setting, tmp_path: Path) -> None:
    secret_file = tmp_path / "join.secret"
    secret_file.write_text("a" * 40)
    credential = Credential(secret_file=secret_file)
    with setting.coordinator(secret_file=secret_file) as service:
        for incarnation in ("worker-0a", "worker-0b"):  # two lives at one address
            membership = setting.membership(credential, incarnation)
            membership.register()
            membership.stop()
        assert service.coordinator.members == ["worker-0b"] and setting.joins("admitted") == 2
        secret_file.write_text("b" * 40)
        membership = setting.membership(credential, "worker-0c")
        membership.register()
        membership.stop()
        assert setting.joins("admitted") == 3
        stranger = setting.membership(Credential(setting.token(secret=b"a" * 40)), "worker-0d")
        with pytest.raises(UserError, match="is not signed with this run's secret"):
            stranger.register()
        stranger.stop()


def test_the_command_prints_a_token_that_lets_one_in(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join-token", "--secret", str(setting.secret_file), "--role", "shard", "--valid-for", "5m"]) == 0
    token = capsys.readouterr().out.strip()
    with setting.coordinator() as service:
        setting.register(token, incarnation="shard-01")
        assert service.coordinator.members == ["shard-01"]


def test_without_a_secret_nobody_is_asked(tmp_path: Path) -> None:
    write_token_folder(tmp_path / "data")
    metrics = Metrics("coordinator")
    service = CoordinatorService(small_config(), run_dir=tmp_path, metrics=metrics)
    service.start()
    try:
        with rpc.connect(service.address) as channel:
            request = coordinator_pb2.RegisterRequest(
                protocol_version=PROTOCOL_VERSION,
                role=coordinator_pb2.ROLE_WORKER,
                incarnation="worker-01",
                address="worker.local:1",
            )
            assert rpc.Client(channel, SERVICE).Register(request, timeout=20).readmission == ""
    finally:
        service.stop()


def test_a_secret_that_cannot_be_read_is_the_users(tmp_path: Path) -> None:
    write_token_folder(tmp_path / "data")
    with pytest.raises(UserError, match="cannot read the secret"):
        CoordinatorService(small_config(), run_dir=tmp_path, join_secret_file=tmp_path / "none")


def test_a_shard_as_a_process_shows_what_it_was_given(tmp_path: Path, certs: Path) -> None:
    setting = Setting(tmp_path, certs, has_tls=False)
    with setting.coordinator() as service:
        command = [sys.executable, "-m", "ps_service", "--coordinator", service.address]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert refused.returncode == 2
        assert "this run takes newcomers with a join token only" in refused.stderr.splitlines()[-1]
        environment = {**os.environ, "SHARDLANE_JOIN_SECRET_FILE": str(setting.secret_file)}
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as shard:
            try:
                until(lambda: service.coordinator.members, seconds=100)
            finally:
                shard.terminate()
        assert (setting.joins("admitted"), setting.joins("missing")) == (1, 1)
