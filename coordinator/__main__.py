"""`python -m coordinator`: serves one run. Flags beat SHARDLANE_* variables; `--section.key value` beats the config file."""

from __future__ import annotations

import argparse
import ipaddress
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
from shardlane.process import Lifetime, run_main, write_ready_file

if TYPE_CHECKING:
    from coordinator.service import CoordinatorService

LEAVE_SECONDS = 10.0  # that members have to hear that the run has ended
_POLL_SECONDS = 0.2
_TRUE = ("1", "true", "yes", "on")


def parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="coordinator",
        description="Serves one run: membership, plans, run control, checkpoint manifests. It needs no GPU and little memory.",
        epilog="Each flag may be given as a variable, such as SHARDLANE_RUN_DIR. Settings of the config are overridden by"
        " --section.key value, or by variables such as SHARDLANE_TRAIN__MAX_STEPS.",
        allow_abbrev=False,
    )

    def text(flag: str, default: str, help: str) -> None:
        variable = f"SHARDLANE_{flag.removeprefix('--').replace('-', '_').upper()}"
        made.add_argument(flag, default=environment.get(variable, default), help=help)

    def switch(flag: str, help: str) -> None:
        variable = f"SHARDLANE_{flag.removeprefix('--').replace('-', '_').upper()}"
        made.add_argument(flag, action="store_true", default=environment.get(variable, "").lower() in _TRUE, help=help)

    text("--config", "", "the run's settings, TOML or YAML")
    text("--run-dir", "", "the run's folder: state, metrics.jsonl, checkpoints, and the data unless data.path is set")
    text("--bind", "127.0.0.1:0", "host:port to serve on; port 0 takes any free one")
    text("--advertise", "", "host, or host:port, under which members reach it; default: as bound")
    text("--metrics-bind", "127.0.0.1:0", "host:port of /metrics; empty: none")
    text("--ready-file", "", "written as JSON (address, metrics_address, pid) once it serves")
    switch("--fork-run", "go on from the newest checkpoint although the mathematics have changed: another run from its weights")
    switch("--stay", "keep serving after the run has ended")
    switch("--insecure", "serve in plain text on an address that other machines can reach")
    return made


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    from coordinator.service import CoordinatorService  # brings gRPC, which looks at its variables as it is loaded
    from shardlane.metrics import Metrics

    flags, overrides = parser(environment).parse_known_args(arguments)
    for name in ("config", "run_dir"):
        if not getattr(flags, name):
            raise UserError(f"--{name.replace('_', '-')} is missing, and so is SHARDLANE_{name.upper()}; give one of them")
    if not flags.insecure and not is_loopback(flags.bind):
        raise UserError(
            f"--bind {flags.bind} can be reached from other machines, in plain text; add --insecure, or bind 127.0.0.1"
        )
    lifetime = Lifetime()
    lifetime.install_signals()
    lifetime.watch_parent(environment)
    config = configs.load(flags.config, overrides, environment)
    run_dir = Path(flags.run_dir)
    logs.configure(config.log, role="coordinator")
    metrics = Metrics("coordinator")
    metrics_port = metrics.serve(flags.metrics_bind) if flags.metrics_bind else 0
    service = CoordinatorService(
        config, run_dir=run_dir, bind=flags.bind, advertise=flags.advertise, fork=flags.fork_run, metrics=metrics
    )
    service.start()
    try:
        if flags.ready_file:
            metrics_address = advertised_metrics(flags.metrics_bind, flags.advertise, metrics_port) if metrics_port else ""
            ready = {"address": service.address, "metrics_address": metrics_address, "pid": os.getpid(), "run_id": service.run_id}
            write_ready_file(Path(flags.ready_file), ready)
        logs.logger(role="coordinator", run=service.run_id).info("serving", address=service.address)
        return serve(service, lifetime, stay=flags.stay)
    finally:
        service.stop()
        metrics.close()


def serve(service: CoordinatorService, lifetime: Lifetime, *, stay: bool) -> int:
    """Waits for the end of the run or a signal; the exit status."""
    ended_seconds: float | None = None
    while not lifetime.stop_requested.is_set():
        state = service.wait_finished(_POLL_SECONDS)
        if state not in (RunState.FINISHED, RunState.FAILED) or stay:
            lifetime.stop_requested.wait(_POLL_SECONDS if stay else 0.0)
            continue
        ended_seconds = ended_seconds or time.monotonic()
        if service.wait_left(_POLL_SECONDS) or time.monotonic() - ended_seconds > LEAVE_SECONDS:
            break
    if service.state is RunState.FAILED:
        raise UserError(f"the run has failed: {service.coordinator.run.failure}")
    return 0


def advertised_metrics(bind: str, advertise: str, port: int) -> str:
    """`advertise` may name the port of the gRPC server: only its host holds for both."""
    from shardlane import rpc

    host, _, suffix = advertise.rpartition(":")
    return rpc.advertised(bind, host if suffix.isdigit() else advertise, port)


def is_loopback(bind: str) -> bool:
    host = bind.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(run_main("coordinator", lambda: main(sys.argv[1:], os.environ)))
