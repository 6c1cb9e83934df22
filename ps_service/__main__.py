"""`python -m ps_service`: one parameter shard. Torch is imported only once the config has said with how many threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from shardlane import logs
from shardlane.credentials import Credential
from shardlane.flags import ServiceParser
from shardlane.process import Lifetime, exit_now, prepare_process, run_main, write_ready_file

_POLL_SECONDS = 0.2


def parser(environment: Mapping[str, str]) -> ServiceParser:
    made = ServiceParser(
        "ps_service",
        "A parameter shard: holds weights and optimizer state of its part of the model, and commits steps.",
        environment,
    )
    made.add_joining()
    made.add_serving()
    return made


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    from shardlane import rpc  # brings gRPC, which looks at its variables as it is loaded
    from shardlane.member import fetch_run

    flags = parser(environment).parse(arguments, required=("--coordinator",))
    lifetime = Lifetime()
    lifetime.install_signals()
    lifetime.watch_parent(environment)
    run = fetch_run(flags.coordinator, run_id=flags.run_id, network=rpc.Network.of(flags), credential=Credential.of(flags))
    logs.configure(run.config.log, role="shard", run=run.run_id)
    prepare_process(run.config.numerics.threads)

    from ps_service.service import ShardService

    service = ShardService(flags.coordinator, run, bind=flags.bind, advertise=flags.advertise, metrics_bind=flags.metrics_bind)
    service.start()
    try:
        if flags.ready_file:
            ready = {"address": service.address, "metrics_address": service.metrics_address, "pid": os.getpid()}
            write_ready_file(Path(flags.ready_file), ready)
        while not lifetime.stop_requested.wait(_POLL_SECONDS):
            if service.run_has_ended and not flags.stay:
                break
        else:
            service.leave(flags.drain_seconds)
    finally:
        service.stop()
    return service.exit_status


if __name__ == "__main__":
    exit_now(run_main("ps_service", lambda: main(sys.argv[1:], os.environ)))
