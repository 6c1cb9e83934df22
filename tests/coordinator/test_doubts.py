"""Who is found dead at once although its stream tells nothing: the port is tried again. The lease here is a minute."""

from __future__ import annotations

import socket
from pathlib import Path

from coordinator.core.events import Registration
from coordinator.service import SERVICE, CoordinatorService
from shardlane import rpc, wire
from shardlane.config import Config
from shardlane.pb import coordinator_pb2
from tests.coordinator.cast import registration, small_config, write_token_folder
from tests.coordinator.test_service import until


def register(client: rpc.Client, each: Registration) -> None:
    request = coordinator_pb2.RegisterRequest(
        protocol_version=each.protocol_version,
        role=wire.role_to_wire(each.role),
        incarnation=each.incarnation,
        address=each.address,
        numerics_class=each.numerics_class,
    )
    client.Register(request, timeout=10)


def config(folder: Path) -> Config:
    write_token_folder(folder / "data")
    return small_config(cluster__lease_seconds=60.0)


def test_a_dying_process_whose_port_outlives_its_stream(tmp_path: Path) -> None:
    service = CoordinatorService(config(tmp_path), run_dir=tmp_path)
    service.start()
    with socket.create_server(("127.0.0.1", 0)) as port, rpc.connect(service.address) as channel:
        client = rpc.Client(channel, SERVICE)
        member = registration("worker 1", address=f"127.0.0.1:{port.getsockname()[1]}")
        register(client, member)
        stream = client.WatchPlans(coordinator_pb2.WatchPlansRequest(incarnation=member.incarnation), timeout=60)
        until(lambda: bool(service.doubts.watched))
        stream.cancel()
        port.settimeout(10)
        port.accept()[0].close()  # the first try finds it open, and proves nothing
        assert service.coordinator.members == [member.incarnation]
        port.close()
        until(lambda: service.coordinator.members == [])
    service.stop()


def test_a_member_that_died_while_the_coordinator_was_away(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        shards = (("shard 1", first), ("shard 2", second))
        members = [registration(name, address=f"127.0.0.1:{port.getsockname()[1]}") for name, port in shards]
        members += [registration("worker 1"), registration("worker 2")]
        service = CoordinatorService(settings, run_dir=tmp_path)
        service.start()
        with rpc.connect(service.address) as channel:
            client = rpc.Client(channel, SERVICE)
            for each in members:
                register(client, each)
            assert service.coordinator.plan is not None
        service.stop()
        first.close()
        again = CoordinatorService(settings, run_dir=tmp_path)
        again.start()
        gone = members[0].incarnation
        until(lambda: gone not in again.coordinator.members)
        assert members[1].incarnation in again.coordinator.members
        again.stop()
