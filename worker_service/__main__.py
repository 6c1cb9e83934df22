"""`python -m worker_service`: one pipeline worker. Torch is imported only once the config has said with how many threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from shardlane import logs
from shardlane.credentials import Credential
from shardlane.errors import UserError
from shardlane.flags import ServiceParser
from shardlane.process import Lifetime, exit_now, prepare_process, run_main, write_ready_file

_POLL_SECONDS = 0.2
_DEVICES = ("auto", "cpu", "cuda")


def parser(environment: Mapping[str, str]) -> ServiceParser:
    made = ServiceParser(
        "worker_service", "A pipeline worker: computes one stage of the model, on a CPU or a CUDA device.", environment
    )
    made.add_joining()
    made.text("--device", "auto", "auto (CUDA where there is one), cpu or cuda")
    made.text("--log-dir", "", "folder for a log file beside stderr; default: none")
    made.add_serving()
    return made


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    from shardlane import rpc  # brings gRPC, which looks at its variables as it is loaded
    from shardlane.member import fetch_run

    flags = parser(environment).parse(arguments, required=("--coordinator",))
    if flags.device not in _DEVICES:
        raise UserError(f"--device is {flags.device!r}; expected one of {', '.join(_DEVICES)}")
    lifetime = Lifetime()
    lifetime.install_signals()
    lifetime.watch_parent(environment)
    run = fetch_run(flags.coordinator, run_id=flags.run_id, network=rpc.Network.of(flags), credential=Credential.of(flags))
    file = Path(flags.log_dir) / f"worker-{os.getpid()}.log" if flags.log_dir else None
    logs.configure(run.config.log, file, role="worker", run=run.run_id)
    prepare_process(run.config.numerics.threads)

    from worker_service.service import WorkerService

    service = WorkerService(
        flags.coordinator,
        run,
        bind=flags.bind,
        advertise=flags.advertise,
        device=flags.device,
        metrics_bind=flags.metrics_bind,
    )
    try:
        service.start()
        if flags.ready_file:
            ready = {"address": service.address, "metrics_address": service.metrics_address, "pid": os.getpid()}
            write_ready_file(Path(flags.ready_file), ready)
        has_ended = False
        while not lifetime.stop_requested.wait(_POLL_SECONDS) and not (has_ended and not flags.stay):
            has_ended = service.wait(0)
        if not has_ended:
            service.leave(flags.drain_seconds)
    finally:
        service.stop()
    return service.exit_status


if __name__ == "__main__":
    exit_now(run_main("worker_service", lambda: main(sys.argv[1:], os.environ)))
