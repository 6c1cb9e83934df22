"""Writes this shard's parts of checkpoints while training goes on: an update copies a chunk that is still unwritten."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ps_service.store import ChunkImage, TensorStore
from shardlane.checkpoint import PartWriter
from shardlane.config import Config
from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId, Incarnation, Version
from shardlane.manifest import checkpoint_folder, tensor_names
from shardlane.pb import coordinator_pb2
from shardlane.storage import Location


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The chunks of one version, pinned."""

    version: Version
    timeline: int
    owner: str  # names the part: a shard that takes over chunks of a version writes another part of it
    images: Mapping[ChunkId, ChunkImage]


class SnapshotWriter:
    """One thread that writes snapshots in turn and reports each, whether it came to be or not.

    After one that failed those that were taken meanwhile are given up, but for the newest: each holds a copy of the state, and
    a disk that stays full or an object store that stays away must not fill the memory.
    """

    def __init__(
        self,
        me: Incarnation,
        root: Location,
        config: Config,
        store: TensorStore,
        report: Callable[[coordinator_pb2.ReportCheckpointRequest], None],
    ) -> None:
        self._me, self._root, self._store, self._report = me, root, store, report
        self._names = tensor_names(config.optimizer.name, config.train.num_past)
        self._num_taken = 0
        self._waiting: deque[Snapshot] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def take(self, timeline: int, version: Version, chunks: tuple[ChunkId, ...]) -> None:
        """Pins the chunks as they are now; called at once after they reached `version`."""
        images = {chunk: self._store.pin_image(chunk) for chunk in chunks}
        with self._changed:
            self._waiting.append(Snapshot(version, timeline, f"{self._me}-{self._num_taken}", images))
            self._changed.notify_all()
        self._num_taken += 1

    def close(self) -> None:
        """Ends when everything taken is written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (snapshot := self._next()) is not None:
            report = self._begin_report(snapshot)
            try:
                self._write(snapshot, report)
            except CheckpointError as error:
                report.error = str(error)
            self._report(report)
            if report.error:
                self._give_up_older(snapshot.version)

    def _next(self) -> Snapshot | None:
        """None: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._waiting))
            return self._waiting.popleft() if self._waiting else None

    def _give_up_older(self, failed: Version) -> None:
        with self._changed:
            given_up = [self._waiting.popleft() for _ in range(len(self._waiting) - 1)]
        for snapshot in given_up:
            report = self._begin_report(snapshot)
            report.error = f"it waited while that of version {failed} failed, and a newer one is tried next"
            self._report(report)

    def _begin_report(self, snapshot: Snapshot) -> coordinator_pb2.ReportCheckpointRequest:
        return coordinator_pb2.ReportCheckpointRequest(incarnation=self._me, version=snapshot.version, timeline=snapshot.timeline)

    def _write(self, snapshot: Snapshot, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        sizes = {chunk: image.tensors["parameter"].numel() for chunk, image in snapshot.images.items()}
        with PartWriter(checkpoint_folder(self._root, snapshot.version), snapshot.owner, sizes, self._names) as writer:
            for chunk, image in sorted(snapshot.images.items()):
                writer.add(chunk, image.tensors)
                self._store.unpin_image(chunk, image)
            part = writer.finish()
        image = next(iter(snapshot.images.values()))
        report.optimizer_step = image.num_steps
        report.clocks.extend(each.clock for each in image.clocks)
        report.file, report.num_bytes = part.file, part.num_bytes
        for chunk, checksums in part.chunks.items():
            report.chunks.add(chunk=chunk, checksums=checksums)
