"""Where a coordinator takes up its run: in the middle after a restart, at a checkpoint, or at the very beginning."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from coordinator.commit import mark_of
from coordinator.core.beginning import Beginning
from coordinator.core.events import NO_CHECKPOINT, CheckpointMark
from coordinator.core.membership import split_classes
from coordinator.dataset import Dataset
from coordinator.ledger_file import LedgerFile
from coordinator.metrics_file import MetricsFile
from coordinator.store import Snapshot, Store
from shardlane import wire
from shardlane.config import Config
from shardlane.errors import CheckpointError
from shardlane.ids import RunId, Timeline
from shardlane.ledger import Expected
from shardlane.manifest import Manifest, check_resume, newest_complete, read_manifest
from shardlane.pb import coordinator_pb2
from shardlane.storage import Location


@dataclass(frozen=True)
class Session:
    beginning: Beginning
    metrics_file: MetricsFile
    ledger_file: LedgerFile
    snapshot: Snapshot  # of the store as it was found; its reports belong to this session only if `is_restart`
    is_restart: bool


def open_session(config: Config, dataset: Dataset, store: Store, *, run_dir: Path, root: Location, fork: bool) -> Session:
    """`root`: where checkpoints lie. Raises `CheckpointError` if the run may not be resumed by this config, or the newest
    checkpoint is damaged; `OSError` or `sqlite3.Error` on a full disk."""
    snapshot = store.load()
    folder = newest_complete(root)
    manifest = None if folder is None else read_manifest(folder)
    identity = f"{config.mathematics_hash()} {dataset.digest}"
    plan = None if snapshot.plan is None else wire.plan_from_wire(coordinator_pb2.Plan.FromString(snapshot.plan))
    metrics_path = run_dir / "metrics.jsonl"
    ledger_file = LedgerFile(run_dir / "ledger.jsonl", Expected.of(config))
    if plan is not None and snapshot.identity == identity and not snapshot.saved.finished and not fork:
        metrics_file = MetricsFile(metrics_path)
        ledger_file.begin(plan.timeline, plan.reason)  # unless the one before us has written as much
        beginning = Beginning(
            run_id=plan.run_id,
            term=store.term,
            timeline=plan.timeline,
            plan=plan,
            version=max(metrics_file.version, plan.timeline.version),
            checkpoint=_mark(manifest),
            validations=metrics_file.validations,
            registrations=snapshot.registrations,
            classes=split_classes(manifest.numerics_class) if manifest is not None else {},
            saved=snapshot.saved,
        )
        return Session(beginning, metrics_file, ledger_file, snapshot, is_restart=True)
    if config.checkpoint.resume == "never" and manifest is not None:
        raise CheckpointError(
            f'checkpoint.resume is "never", but {root} holds version {manifest.version}; set it to "auto" to go on from there,'
            " or give another --run-dir"
        )
    if manifest is not None:
        check_resume(manifest, config, dataset.digest, dataset.tokenizer_hash, fork=fork)
    mark = _mark(manifest)
    newest_timeline = max(snapshot.timeline, ledger_file.timeline, -1 if manifest is None else manifest.timeline)
    timeline = Timeline(newest_timeline + 1, mark.version, mark.digest, mark.clocks)
    run_id = _run_id(config, manifest, snapshot, is_same=snapshot.identity == identity)
    metrics_file = MetricsFile(metrics_path, mark.version)
    store.begin(run_id, identity, timeline.id)
    beginning = Beginning(
        run_id=run_id,
        term=store.term,
        timeline=timeline,
        version=mark.version,
        checkpoint=mark,
        validations=metrics_file.validations,
        classes=split_classes(manifest.numerics_class) if manifest is not None else {},
    )
    return Session(beginning, metrics_file, ledger_file, snapshot, is_restart=False)


def _run_id(config: Config, manifest: Manifest | None, snapshot: Snapshot, *, is_same: bool) -> RunId:
    """A run keeps its id while mathematics and data are the same; a fork is another run."""
    if is_same and snapshot.run_id:
        return RunId(snapshot.run_id)
    if manifest is not None and not snapshot.run_id and manifest.mathematics_hash == config.mathematics_hash():
        return manifest.run_id
    return RunId(f"{config.run_name}-{secrets.token_hex(4)}")


def _mark(manifest: Manifest | None) -> CheckpointMark:
    return NO_CHECKPOINT if manifest is None else mark_of(manifest)
