"""What a checkpoint holds, as a value, and which checkpoints there are. Pure Python: the coordinator commits with this.

    checkpoints/step-00000100/part-<owner>.safetensors    one a shard (`shardlane.checkpoint` writes and reads them)
    checkpoints/step-00000100/manifest.json               written last, atomically

A folder, or a prefix in an object store (`shardlane.storage`), without a valid manifest is no checkpoint. A manifest speaks of
chunks, never of shards, so any topology can resume.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from shardlane.config import Config, ModelConfig
from shardlane.errors import CheckpointError
from shardlane.ids import ChunkId, RunId, Version
from shardlane.partition import OPTIMIZER_STATES, Layout, state_names
from shardlane.storage import Location, file_size, folders_in, remove_folder, write_whole

FORMAT_VERSION: Final = 1
MANIFEST = "manifest.json"
PARAMETER = "parameter"
FORK_MAY_CHANGE_OF_MODEL = frozenset({"model.rope_theta", "model.rms_norm_eps", "model.initializer_range"})
_FOLDER = re.compile(r"step-(\d{8,19})")

Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
PartFile = Annotated[str, StringConstraints(pattern=r"^part-[A-Za-z0-9._-]+\.safetensors$")]


@dataclass(frozen=True, slots=True)
class PartReport:
    """What a shard says of the part it has made durable. Checksums are xxh3_64 in hex, by tensor name."""

    file: str
    num_bytes: int
    chunks: Mapping[ChunkId, Mapping[str, str]]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Frozen):
    file: PartFile
    num_bytes: int = Field(ge=8)


class ChunkEntry(_Frozen):
    part: PartFile
    checksums: dict[str, Checksum]


class Manifest(_Frozen):
    """`chunks[i]` is chunk i of the layout that `mathematics` fixes; every chunk is there, with every optimizer state."""

    format_version: Literal[1] = FORMAT_VERSION
    run_id: RunId
    version: Version = Field(ge=0)
    optimizer_step: int = Field(ge=0, description="steps that were applied: the version less those skipped")
    timeline: int = Field(ge=0)
    numerics_class: str
    data_hash: str
    tokenizer_hash: str
    mathematics: dict[str, Any]
    mathematics_hash: str
    parts: tuple[Part, ...]
    chunks: tuple[ChunkEntry, ...]
    clocks: tuple[int, ...] = Field((), description="of each lane, under ASP: batches that it has learnt from")

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.mathematics_hash != _hash_of(self.mathematics):
            raise ValueError("mathematics_hash is not that of mathematics")
        if self.optimizer_step > self.version:
            raise ValueError(f"optimizer_step {self.optimizer_step} is beyond version {self.version}")
        if len(self.chunks) != (expected := len(layout_of(self).chunks)):
            raise ValueError(f"{len(self.chunks)} chunks are listed, the model has {expected}")
        files, names = {part.file for part in self.parts}, set(self.tensor_names)
        for index, entry in enumerate(self.chunks):
            if entry.part not in files:
                raise ValueError(f"chunk {index} lies in {entry.part}, which is not listed")
            if set(entry.checksums) != names:
                raise ValueError(f"chunk {index} has the tensors {sorted(entry.checksums)}, expected {sorted(names)}")
        return self

    @property
    def num_steps(self) -> int:
        """Steps of the schedule that are done; under ASP a version is one lane's part of one."""
        return sum(self.clocks) // len(self.clocks) if self.clocks else self.version

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """`parameter`, then the optimizer's states: what is kept of each chunk."""
        train = self.mathematics["train"]
        num_past = train.get("staleness", 0) + bool(train.get("look_ahead"))
        return tensor_names(self.mathematics["optimizer"]["name"], num_past)

    @property
    def digest(self) -> str:
        """SHA-256 of all it says: the file's own checksum, and the name of a timeline that begins here."""
        return hashlib.sha256(self._text("").encode()).hexdigest()

    def to_json(self) -> str:
        return self._text(self.digest)

    def _text(self, checksum: str) -> str:
        return json.dumps({"checksum": checksum, **self.model_dump()}, indent=1) + "\n"


def tensor_names(optimizer: str, num_past: int = 0) -> tuple[str, ...]:
    return (PARAMETER, *state_names(optimizer, num_past))


def layout_of(manifest: Manifest) -> Layout:
    """The tensors and chunks of a checkpoint, from what it says of itself."""
    return Layout(ModelConfig(**manifest.mathematics["model"]), manifest.mathematics["numerics"]["chunk_bytes"])


def build_manifest(
    config: Config,
    parts: Sequence[PartReport],
    *,
    run_id: RunId,
    version: Version,
    optimizer_step: int,
    timeline: int,
    numerics_class: str,
    data_hash: str,
    tokenizer_hash: str,
    clocks: tuple[int, ...] = (),
) -> Manifest:
    """Joins the shards' reports. A chunk in two parts (its primary died after writing) counts once; it must be the same in both.

    Raises `CheckpointError` if a chunk is missing, differs between parts, or lacks a tensor.
    """
    try:
        found = _join_parts(config, parts)
        sizes = {part.file: part.num_bytes for part in parts}
        return Manifest(
            run_id=run_id,
            version=version,
            optimizer_step=optimizer_step,
            timeline=timeline,
            numerics_class=numerics_class,
            data_hash=data_hash,
            tokenizer_hash=tokenizer_hash,
            mathematics=config.mathematics(),
            mathematics_hash=config.mathematics_hash(),
            parts=tuple(Part(file=file, num_bytes=sizes[file]) for file in sorted({entry.part for entry in found.values()})),
            chunks=tuple(found[chunk] for chunk in sorted(found)),
            clocks=clocks,
        )
    except ValueError as error:
        raise CheckpointError(f"version {version} is not checkpointed: {_reason(error)}") from error


def write_manifest(folder: Location, manifest: Manifest) -> Manifest:
    """Makes the checkpoint exist, and returns the manifest that is there.

    In an object store whoever is first has committed: that may have been we ourselves, by a request whose answer was lost, or
    the coordinator before us on this timeline. Raises `CheckpointError`, and leaves none of ours, if a part is missing, the disk
    is full, or the checkpoint is one of another timeline.
    """
    _check_parts(folder, manifest)
    try:
        write_whole(folder / MANIFEST, manifest.to_json().encode())
    except FileExistsError as error:
        there = read_complete(folder)
        if (there.run_id, there.timeline, there.version) != (manifest.run_id, manifest.timeline, manifest.version):
            raise CheckpointError(
                f"{folder} holds version {there.version} of run {there.run_id}, timeline {there.timeline}, already; it stays, and"
                f" that of run {manifest.run_id}, timeline {manifest.timeline}, is not taken: give each run a checkpoint.path"
            ) from error
        return there
    except OSError as error:
        raise cannot_write(folder / MANIFEST, error) from error
    return manifest


def read_manifest(folder: Location) -> Manifest:
    """The manifest, checked against its own checksum; the parts are not looked at. Raises `CheckpointError`."""
    file = folder / MANIFEST
    try:
        text = file.read_bytes().decode()
        values = json.loads(text)
        stated = values.pop("checksum")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {MANIFEST}, so it is no complete checkpoint; use another one") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(file, "it is not a manifest") from error
    unsigned = text.replace(f'"checksum": "{stated}"', '"checksum": ""', 1)
    if hashlib.sha256(unsigned.encode()).hexdigest() != stated:
        raise damaged(file, "it does not match its own checksum")
    if (found := values.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format {found}, expected {FORMAT_VERSION}; use the Shardlane that wrote it")
    try:
        return Manifest.model_validate(values)
    except (ValidationError, KeyError, TypeError) as error:
        raise damaged(file, _reason(error)) from error


def read_complete(folder: Location) -> Manifest:
    """The manifest of a checkpoint whose parts are all there, each of its size. Raises `CheckpointError`."""
    manifest = read_manifest(folder)
    _check_parts(folder, manifest)
    return manifest


def checkpoint_folder(root: Location, version: Version) -> Location:
    return root / f"step-{version:08d}"


def list_complete(root: Location) -> list[tuple[Version, Location]]:
    """Complete checkpoints, oldest first."""
    return [(version, folder) for version, folder in reversed(_folders(root)) if _is_complete(version, folder)]


def newest_complete(root: Location) -> Location | None:
    """The newest complete checkpoint; folders without a manifest, of writes that were cut short, are passed over.

    Raises `CheckpointError` if there is a newer one that is damaged: to go on from an older one would overwrite, step by step,
    what may yet be restored.
    """
    for version, folder in _folders(root):
        if _has_manifest(folder):
            if (found := read_complete(folder).version) != version:
                raise CheckpointError(f"{folder} holds version {found}; rename it back, or move it elsewhere")
            return folder
    return None


def prune(root: Location, keep_last: int) -> list[Location]:
    """Keeps the newest `keep_last` complete checkpoints; removes what is older, and torn folders older than the newest.

    A folder loses its manifest first: a removal that is cut short leaves a torn checkpoint, never a false one. Returns what
    is gone. Raises `CheckpointError` when a folder cannot be removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; the newest checkpoint is never removed")
    complete = list_complete(root)
    if not complete:
        return []
    oldest_kept, newest = complete[-keep_last:][0][0], complete[-1][0]
    removed = []
    for version, folder in reversed(_folders(root)):
        if version < oldest_kept or (version < newest and not _has_manifest(folder)):
            try:
                remove_folder(folder, first=MANIFEST)
            except OSError as error:
                raise CheckpointError(f"cannot remove the old {folder}: {error.strerror}; remove it by hand") from error
            removed.append(folder)
    return removed


def check_resume(manifest: Manifest, config: Config, data_hash: str, tokenizer_hash: str, *, fork: bool) -> None:
    """Whether `config` may go on from this checkpoint. Raises `CheckpointError` naming the first key that differs.

    A fork may change the mathematics, but not what the chunks mean: the model's shape, `numerics.chunk_bytes`, or an
    optimizer to one with other states.
    """
    there = {**_flat(manifest.mathematics), "tokenizer hash": manifest.tokenizer_hash, "data hash": manifest.data_hash}
    here = {**_flat(config.mathematics()), "tokenizer hash": tokenizer_hash, "data hash": data_hash}
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if old == new or (fork and _fork_may_change(key, old, new)):
            continue
        remedy = "a fork cannot change it" if fork else "put it back, or pass --fork-run to begin another run from these weights"
        raise CheckpointError(
            f"cannot resume run {manifest.run_id} at version {manifest.version}: {key} was {old!r} and is now {new!r}; {remedy}"
        )


def cannot_write(file: Location, error: OSError) -> CheckpointError:
    remedy = "free the disk or set checkpoint.path elsewhere" if isinstance(file, Path) else "the next one is tried"
    return CheckpointError(f"cannot write {file}: {error.strerror}; this checkpoint is not taken, {remedy}")


def damaged(file: Location, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {what}; restore it from a copy, or remove {file.parent} to use an older one")


def _join_parts(config: Config, parts: Sequence[PartReport]) -> dict[ChunkId, ChunkEntry]:
    """Where each chunk lies. Raises `ValueError`."""
    found: dict[ChunkId, ChunkEntry] = {}
    for part in sorted(parts, key=lambda part: part.file):
        for chunk, checksums in part.chunks.items():
            entry = found.setdefault(chunk, ChunkEntry(part=part.file, checksums=dict(checksums)))
            if entry.checksums != checksums:
                raise ValueError(f"chunk {chunk} differs between {entry.part} and {part.file}; copies of a shard disagree")
    chunks = Layout.of(config).chunks
    if missing := [chunk.id for chunk in chunks if chunk.id not in found]:
        raise ValueError(f"no part holds chunk {missing[0]} ({len(missing)} of {len(chunks)} are missing)")
    return found


def _fork_may_change(key: str, old: Any, new: Any) -> bool:
    if key == "optimizer.name":
        return old in OPTIMIZER_STATES and OPTIMIZER_STATES[old] == OPTIMIZER_STATES[new]
    return key in FORK_MAY_CHANGE_OF_MODEL or not (key.startswith("model.") or key == "numerics.chunk_bytes")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys, in the config's order."""
    return dict(_flatten(values, ""))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _folders(root: Location) -> list[tuple[Version, Location]]:
    """Folders named like checkpoints, newest first."""
    try:
        matches = [(_FOLDER.fullmatch(folder.name), folder) for folder in folders_in(root)]
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoints in {root}: {error.strerror}") from error
    return sorted(((Version(int(match[1])), folder) for match, folder in matches if match), key=lambda each: -each[0])


def _has_manifest(folder: Location) -> bool:
    try:
        return (folder / MANIFEST).exists()
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / MANIFEST}: {error.strerror}") from error


def _is_complete(version: Version, folder: Location) -> bool:
    try:
        return read_complete(folder).version == version
    except CheckpointError:
        return False


def _check_parts(folder: Location, manifest: Manifest) -> None:
    for part in manifest.parts:
        file = folder / part.file
        try:
            found = file_size(file)
        except FileNotFoundError as error:
            raise damaged(file, "it is missing") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        if found != part.num_bytes:
            raise damaged(file, f"it has {found} bytes, expected {part.num_bytes}")


def _hash_of(mathematics: Mapping[str, Any]) -> str:
    """As `Config.mathematics_hash`."""
    return hashlib.sha256(json.dumps(mathematics, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"]).removeprefix("Value error, ")
