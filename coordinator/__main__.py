"""`python -m coordinator`: serves one run. Flags beat SHARDLANE_* variables; `--section.key value` beats the config file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.core.events import RunState
from shardlane import config as configs
from shardlane import logs
from shardlane.errors import UserError
from shardlane.flags import ServiceParser
from shardlane.process import Lifetime, exit_now, run_main, write_ready_file

if TYPE_CHECKING:
    from coordinator.service import CoordinatorService

LEAVE_SECONDS = 10.0  # that members have to hear that the run has ended
DEPARTURE_SECONDS = 1.0  # that members have to say that they leave too, when this one is told to stop
_POLL_SECONDS = 0.2


def parser(environment: Mapping[str, str]) -> ServiceParser:
    made = ServiceParser(
        "coordinator",
        "Serves one run: membership, plans, run control, checkpoint manifests. It needs no GPU and little memory.",
        environment,
        epilog="Settings of the config are overridden by --section.key value, or by SHARDLANE_TRAIN__MAX_STEPS and its like.",
    )
    made.text("--config", "", "the run's settings, TOML or YAML")
    made.text("--run-dir", "", "the run's folder: state, metrics.jsonl, and checkpoints and data unless their paths are set")
    made.switch(
        "--fork-run", "go on from the newest checkpoint although the mathematics have changed: another run from its weights"
    )
    made.text(
        "--join-secret-file", "", "members show a join token that this secret signs (`shardlane certs` makes one); empty: none"
    )
    made.text("--status-bind", "127.0.0.1:0", "host:port of the status page, plain HTTP; empty: none")
    made.text("--control-token-file", "", "who has the token in it may pause, resume and stop the run by the page; empty: nobody")
    made.add_serving()
    return made


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    from coordinator.service import CoordinatorService  # brings gRPC, which looks at its variables as it is loaded
    from coordinator.status_page import StatusPage
    from shardlane import rpc
    from shardlane.metrics import Metrics

    flags, overrides = parser(environment).parse_with_overrides(list(arguments), required=("--config", "--run-dir"))
    lifetime = Lifetime()
    lifetime.install_signals()
    lifetime.watch_parent(environment)
    config = configs.load(flags.config, overrides, environment)
    run_dir = Path(flags.run_dir)
    logs.configure(config.log, role="coordinator")
    metrics = Metrics("coordinator")
    metrics_port = metrics.serve(flags.metrics_bind) if flags.metrics_bind else 0
    page = None
    if flags.status_bind:
        token_file = Path(flags.control_token_file) if flags.control_token_file else None
        page = StatusPage(flags.status_bind, metrics, token_file=token_file, is_insecure=flags.insecure)
    service = CoordinatorService(
        config,
        run_dir=run_dir,
        bind=flags.bind,
        advertise=flags.advertise,
        fork=flags.fork_run,
        metrics=metrics,
        network=rpc.Network.of(flags),
        join_secret_file=Path(flags.join_secret_file) if flags.join_secret_file else None,
    )
    service.start()
    if page is not None:
        page.start(service.coordinator)
    try:
        if flags.ready_file:
            metrics_address = rpc.advertised_metrics(flags.metrics_bind, flags.advertise, metrics_port) if metrics_port else ""
            ready = {"address": service.address, "metrics_address": metrics_address, "pid": os.getpid(), "run_id": service.run_id}
            if page is not None:
                ready["status_address"] = rpc.advertised_metrics(flags.status_bind, flags.advertise, page.port)
            write_ready_file(Path(flags.ready_file), ready)
        logs.logger(role="coordinator", run=service.run_id).info("serving", address=service.address)
        return serve(service, lifetime, stay=flags.stay, drain_seconds=flags.drain_seconds)
    finally:
        if page is not None:
            page.close()
        service.stop()
        metrics.close()


def serve(service: CoordinatorService, lifetime: Lifetime, *, stay: bool, drain_seconds: float) -> int:
    """Waits for the end of the run or a signal; the exit status. Members that leave at the same time go first."""
    ended_seconds: float | None = None
    while not lifetime.stop_requested.is_set():
        state = service.wait_finished(_POLL_SECONDS)
        if state not in (RunState.FINISHED, RunState.FAILED) or stay:
            lifetime.stop_requested.wait(_POLL_SECONDS if stay else 0.0)
            continue
        ended_seconds = ended_seconds or time.monotonic()
        if service.wait_left(_POLL_SECONDS) or time.monotonic() - ended_seconds > LEAVE_SECONDS:
            break
    if lifetime.stop_requested.is_set():
        service.wait_departures(DEPARTURE_SECONDS, drain_seconds)
    if service.state is RunState.FAILED:
        raise UserError(f"the run has failed: {service.coordinator.run.failure}")
    return 0


if __name__ == "__main__":
    exit_now(run_main("coordinator", lambda: main(sys.argv[1:], os.environ)))
