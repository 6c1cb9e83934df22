"""A checkpoint's manifest is written on a thread of its own: a slow disk or object store holds up no heartbeat."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from coordinator.core.events import CheckpointMark, CommitCheckpoint
from coordinator.dataset import Dataset
from shardlane.config import Config
from shardlane.errors import CheckpointError
from shardlane.ids import Version
from shardlane.manifest import Manifest, PartReport, build_manifest, checkpoint_folder, prune, write_manifest
from shardlane.storage import Location


def mark_of(manifest: Manifest) -> CheckpointMark:
    return CheckpointMark(Version(manifest.version), manifest.digest, manifest.clocks)


Committed = Callable[[CheckpointMark], None]
Failed = Callable[[Version, str], None]


class Committer:
    """Commits checkpoints in the order in which they became whole, then removes old ones."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        root: Location,
        *,
        committed: Committed,
        failed: Failed,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._dataset, self._root = config, dataset, root
        self._committed, self._failed, self._warn = committed, failed, warn
        self._work: queue.SimpleQueue[CommitCheckpoint | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def put(self, commit: CommitCheckpoint) -> None:
        self._work.put(commit)

    def close(self) -> None:
        """Finishes what was begun."""
        self._work.put(None)
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while (commit := self._work.get()) is not None:
            try:
                mark = self._commit(commit)
            except CheckpointError as error:
                self._failed(commit.version, str(error))
                continue
            self._committed(mark)
            try:
                prune(self._root, self._config.checkpoint.keep_last)
            except CheckpointError as error:
                self._warn(str(error))

    def _commit(self, commit: CommitCheckpoint) -> CheckpointMark:
        manifest = build_manifest(
            self._config,
            [PartReport(part.file, part.num_bytes, part.chunks) for part in commit.parts],
            run_id=commit.run_id,
            version=commit.version,
            optimizer_step=commit.optimizer_step,
            timeline=commit.timeline,
            numerics_class=commit.numerics_class,
            data_hash=self._dataset.digest,
            tokenizer_hash=self._dataset.tokenizer_hash,
            clocks=commit.parts[0].clocks,
        )
        return mark_of(write_manifest(checkpoint_folder(self._root, commit.version), manifest))
