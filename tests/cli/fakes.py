"""A cluster of fakes under the real supervisor, as a process that a test can send signals to.

python tests/cli/fakes.py cluster RUN_DIR WORKER    runs `Cluster` over a coordinator and two members, one of them WORKER
python tests/cli/fakes.py coordinator RUN_DIR       answers GetStatus and Control; ends when it was asked to stop
python tests/cli/fakes.py steady RUN_DIR            ends when the coordinator has stopped the run
python tests/cli/fakes.py broken RUN_DIR            says something, and fails
python tests/cli/fakes.py hung RUN_DIR              ignores SIGTERM
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from shardlane import rpc
from shardlane.cli.cluster import Cluster, Commands
from shardlane.cli.live import PlainView
from shardlane.cli.run_folder import RunFolder
from shardlane.config import Config
from shardlane.pb import coordinator_pb2
from shardlane.process import Lifetime, write_ready_file

SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]


def cluster(run_dir: Path, worker: str) -> int:
    def command(role: str) -> list[str]:
        return [sys.executable, __file__, role, str(run_dir)]

    members = {"shard-0": command("steady"), "worker-0": command(worker)}
    coordinator = command("refusing" if worker == "refused" else "coordinator")
    made = Cluster(Config(), RunFolder(run_dir), PlainView(1, 10), Commands(coordinator, lambda address: members))
    status = made.run(on_accepted=lambda: print("accepted", flush=True))
    print(*made.complaint, sep="\n", file=sys.stderr)
    return status


class Coordinator:
    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file

    def __getattr__(self, name: str) -> Any:  # the methods that a person does not call
        return lambda request, context: None

    def GetStatus(self, request: Any, context: Any) -> coordinator_pb2.GetStatusResponse:
        has_stopped = self._stop_file.exists()
        state = coordinator_pb2.RUN_STATE_FINISHED if has_stopped else coordinator_pb2.RUN_STATE_TRAINING
        return coordinator_pb2.GetStatusResponse(run_id="fake", state=state, last_step=10)

    def Control(self, request: Any, context: Any) -> coordinator_pb2.ControlResponse:
        if request.action == coordinator_pb2.CONTROL_ACTION_STOP:
            self._stop_file.touch()
        return coordinator_pb2.ControlResponse(state=coordinator_pb2.RUN_STATE_TRAINING)


def main(role: str, run_dir: Path) -> int:
    stop_file = run_dir / "stopped"
    lifetime = Lifetime()
    lifetime.install_signals()
    lifetime.watch_parent(os.environ)
    match role:
        case "refusing":
            print("coordinator: cannot resume: train.seed was 1 and is now 2", file=sys.stderr)
            return 2
        case "coordinator":
            server = rpc.Server("127.0.0.1:0", {SERVICE.full_name: rpc.handler(SERVICE, Coordinator(stop_file))})
            server.start()
            write_ready_file(run_dir / "coordinator.json", {"address": f"127.0.0.1:{server.port}"})
        case "broken":
            time.sleep(0.5)
            print("a line before", "the GPU has fallen off the bus", sep="\n", file=sys.stderr)
            return 3
        case "hung":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stop_file = run_dir / "never"
    (run_dir / f"{role}.pid").write_text(str(os.getpid()))
    while not stop_file.exists() and not lifetime.stop_requested.wait(0.05):
        pass
    time.sleep(0.3)  # for its state to be heard
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        sys.exit(cluster(Path(sys.argv[2]), sys.argv[3]))
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
