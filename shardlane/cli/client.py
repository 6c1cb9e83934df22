"""A person's side of the coordinator: where the run stands, and what it is to do."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from shardlane import rpc
from shardlane.cli.run_folder import RunFolder
from shardlane.errors import UserError
from shardlane.pb import coordinator_pb2
from shardlane.pb.coordinator_pb2 import ControlAction, GetStatusResponse, RunState
from shardlane.tls import Tls

_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]


def state_name(state: RunState) -> str:
    """`training`, …"""
    return RunState.Name(state).removeprefix("RUN_STATE_").lower()


class CoordinatorClient:
    def __init__(self, address: str, network: rpc.Network = rpc.PLAIN) -> None:
        self._what = f"the coordinator at {address}"
        self._channel = network.connect(address, to="coordinator")
        self._client = rpc.Client(self._channel, _SERVICE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._channel.close()

    def status(self, timeout_seconds: float = 5.0, *, points: int = 0) -> GetStatusResponse:
        """`points`: most of each curve; 0: without curves, events and checkpoints. Raises `UnreachableError`, `UserError`."""
        request = coordinator_pb2.GetStatusRequest(points=points)
        with rpc.user_errors(self._what):
            response: GetStatusResponse = self._client.GetStatus(request, timeout=timeout_seconds)
        return response

    def control(self, action: ControlAction | str, timeout_seconds: float = 5.0) -> RunState:
        """The state thereafter. Raises `UnreachableError`, `UserError`."""
        with rpc.user_errors(self._what):
            response = self._client.Control(coordinator_pb2.ControlRequest(action=action), timeout=timeout_seconds)
        state: RunState = response.state
        return state


def network_of(certs: Path | None) -> rpc.Network:
    """The operator's, with the certificates of a folder; in plain text without one. Raises `UserError`."""
    return rpc.PLAIN if certs is None else rpc.Network(Tls.in_folder(certs, "operator"))


def address_of(target: str) -> str | None:
    """Of the coordinator that serves a run's folder, or host:port as it is; None: nobody serves that folder.

    Raises `UserError` for what is neither.
    """
    if Path(target).is_dir():
        return RunFolder(Path(target)).coordinator_address()
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{target} is neither a run's folder nor host:port")
    return target


def connect(target: str, network: rpc.Network = rpc.PLAIN) -> CoordinatorClient:
    """Raises `UserError` if nobody serves the run."""
    address = address_of(target)
    if address is None:
        raise UserError(f"no coordinator serves {target}; the run is not running")
    return CoordinatorClient(address, network)
