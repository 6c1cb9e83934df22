"""A run's folder: what lies where, and who may write there."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardlane import config as configs
from shardlane.config import Config
from shardlane.errors import CheckpointError, UserError
from shardlane.files import replace_file
from shardlane.ids import Version
from shardlane.manifest import checkpoint_folder, list_complete, newest_complete, read_complete, read_manifest
from shardlane.storage import Location, locate


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.resolved.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def coordinator_file(self) -> Path:
        """Where its coordinator serves, while it does."""
        return self.path / "coordinator.json"

    def ready_file(self, name: str) -> Path:
        """Where a process of a local cluster says that it serves, and where."""
        return self.coordinator_file if name == "coordinator" else self.path / "ready" / f"{name}.json"

    def ready(self, name: str) -> dict[str, Any]:
        """What a process of a local cluster has said of itself when it served; empty if none has."""
        try:
            values = json.loads(self.ready_file(name).read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def config(self) -> Config:
        """Raises `UserError` if this is no run's folder."""
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is no run's folder: it has no {self.config_file.name}; name the --run-dir of a run")
        return configs.load(self.config_file)

    def write_config(self, config: Config, file: Path | None = None) -> Path:
        """Atomically, to `config.resolved.toml` unless `file` is given. Raises `UserError`."""
        file = file or self.config_file
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_file(file, configs.to_toml(config).encode())
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; free the disk, or give another --run-dir") from error
        return file

    def checkpoints(self, config: Config) -> Location:
        return locate(config.checkpoint.path or str(self.path / "checkpoints"))

    def data(self, config: Config) -> Location | None:
        """None if nobody knows where they are."""
        return locate(config.data.path or str(self.path / "data"))

    def newest_version(self, config: Config) -> Version | None:
        """Of the newest complete checkpoint."""
        folder = newest_complete(self.checkpoints(config))
        return None if folder is None else read_complete(folder).version

    def checkpoint(self, config: Config, step: int | None = None) -> tuple[Version, Location]:
        """That of `step`, or the newest. Raises `CheckpointError`, which names those that there are."""
        root = self.checkpoints(config)
        if step is not None and _is_there(folder := checkpoint_folder(root, Version(step))):
            return read_complete(folder).version, folder  # broken ones say what is wrong with them
        if step is None and (newest := newest_complete(root)) is not None:
            return read_complete(newest).version, newest
        complete = list_complete(root)
        wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
        there = f"there are {', '.join(str(version) for version, _ in complete)}" if complete else "train it first"
        raise CheckpointError(f"{root} holds {wanted}; {there}")

    def coordinator_address(self) -> str | None:
        """None if no coordinator serves this run, as far as the folder knows."""
        try:
            return str(json.loads(self.coordinator_file.read_bytes())["address"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.coordinator_file} is not what a coordinator writes; remove it, or name host:port") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """For as long as one process trains here; the system lets go when that process dies. Raises `UserError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("wb")
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror}; give another --run-dir") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another shardlane trains in {self.path}; wait for it, or give another --run-dir") from error
            yield


@dataclass(frozen=True)
class BareCheckpoints(RunFolder):
    """A run of which only the checkpoints are at hand, by the URI of the place that `checkpoint.path` names."""

    uri: str = ""

    def config(self) -> Config:
        """What a checkpoint knows of it: the model, its numerics and the length of its sequences. Raises `CheckpointError`."""
        newest = newest_complete(locate(self.uri))
        if newest is None:
            raise CheckpointError(f"{self.uri} holds no complete checkpoint; name the checkpoint.path of a run")
        mathematics = read_manifest(newest).mathematics
        sections = {name: mathematics[name] for name in ("model", "numerics")}
        train = {"seq_len": mathematics["train"]["seq_len"]}
        return configs.build({**sections, "train": train, "checkpoint": {"path": self.uri}})

    def data(self, config: Config) -> Location | None:
        return locate(config.data.path) if config.data.path else None


def run_of(target: str) -> RunFolder:
    """Of a run's folder, or of the URI of its checkpoints."""
    return BareCheckpoints(Path(), target) if "://" in target else RunFolder(Path(target))


def _is_there(folder: Location) -> bool:
    try:
        return folder.is_dir()
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
