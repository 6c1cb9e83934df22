"""Runs whose data and checkpoints lie in a real S3 server: no shared folder, nothing half-visible, no step that waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator import commit
from shardlane import config as configs
from shardlane import objects
from shardlane.checkpoint import CheckpointReader
from shardlane.cli.__main__ import main
from shardlane.cli.run_folder import RunFolder
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.digest import checkpoint_digest
from shardlane.errors import DataError
from shardlane.export import read_tokenizer
from shardlane.ids import Version
from shardlane.manifest import Manifest, checkpoint_folder, list_complete, newest_complete
from shardlane.objects import ObjectPath
from shardlane.prepare import prepare
from shardlane.storage import Location, locate
from shardlane.token_cache import open_tokens, tokenizer_at
from tests.cluster.processes import SECONDS_MAX, TINY
from tests.cluster.threads import comparable, rows_of, running, train_reference
from tests.object_store import BUCKET, Gate, s3_server

DATA = f"s3://{BUCKET}/data"
STEPS = 16


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with s3_server() as made:
        yield made


@pytest.fixture(scope="module")
def prepared(gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TokenFolder]:
    """A config whose data lie in the store, and the data."""
    settings = ["--train.max_steps", str(STEPS), "--checkpoint.every_steps", "2", "--checkpoint.keep_last", "2"]
    shape = ["--cluster.shards", "2", "--validation.num_micro_batches", "0"]
    cache = ["--data.cache", str(tmp_path_factory.mktemp("cache"))]
    config = configs.load(TINY, [*settings, *shape, *cache])
    tokens = prepare(config, locate(DATA), lambda line: None)
    return config.with_changes({"data.path": DATA}), tokens


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses is given up at once."""
    monkeypatch.setitem(objects._RETRIES, "max_retries", 0)


def state_of(root: Location) -> tuple[list[int], str]:
    """The versions that there are, and the newest one's digest."""
    newest = newest_complete(root)
    assert newest is not None
    return [version for version, _ in list_complete(root)], checkpoint_digest(newest)


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_away_when_a_checkpoint_is_committed_costs_that_checkpoint(
    gate: Gate, prepared: tuple[Config, TokenFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens = prepared
    config = config.with_changes({"checkpoint.path": f"s3://{BUCKET}/away"})
    root, write, reached = locate(config.checkpoint.path), commit.write_manifest, []

    def write_while_away(folder: Location, manifest: Manifest) -> Manifest:
        if reached:
            return write(folder, manifest)
        gate.shut()
        try:
            return write(folder, manifest)
        finally:
            run = cluster.coordinator.coordinator.run
            end = time.monotonic() + SECONDS_MAX
            while run.version < manifest.version + 3 and time.monotonic() < end:
                time.sleep(0.001)
            reached.append((manifest.version, run.version))
            gate.open()

    monkeypatch.setattr(commit, "write_manifest", write_while_away)
    with running(config, tmp_path) as cluster:
        cluster.wait()
        failures = cluster.coordinator.coordinator._instruments.checkpoint_failures._value.get()
    ((version, went_on_to),) = reached
    assert went_on_to >= version + 3, "training goes on while the store is away"
    assert failures >= 1
    torn = checkpoint_folder(root, Version(version))
    assert not (torn / "manifest.json").exists() and not torn.is_dir(), "parts without a manifest are pruned"
    digest, rows = train_reference(config, tokens)
    versions, found = state_of(root)
    assert found == digest and versions[-1] == STEPS and len(versions) == 2
    assert comparable(rows_of(tmp_path)) == comparable(rows)


def test_shards_that_read_slowly_keep_their_leases(
    prepared: tuple[Config, TokenFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, tokens = prepared
    config = config.with_changes({"checkpoint.path": f"s3://{BUCKET}/slow", "cluster.lease_seconds": 2.0})
    with running(config.with_changes({"train.stop_at_step": 2}), tmp_path / "before") as cluster:
        cluster.wait()
    read, began = CheckpointReader.read_chunk, time.monotonic()

    def read_slowly(reader: CheckpointReader, chunk: int) -> object:
        time.sleep(max(0.0, began + 5.0 - time.monotonic()))  # more than two leases
        return read(reader, chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointReader, "read_chunk", read_slowly)
    with running(config.with_changes({"train.stop_at_step": 4}), tmp_path / "after") as cluster:
        began = time.monotonic()
        cluster.wait()
        plan = cluster.coordinator.coordinator.plan
        assert plan is not None and plan.timeline.version == 2
    config = config.with_changes({"train.stop_at_step": 4})
    assert state_of(locate(config.checkpoint.path)) == ([2, 4], train_reference(config, tokens)[0])
    assert not [record for record in caplog.records if "was silent" in record.getMessage()]


def test_everything_is_killed_and_another_machine_goes_on(
    prepared: tuple[Config, TokenFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tokens = prepared
    uri, one, other = f"s3://{BUCKET}/killed", tmp_path / "one", tmp_path / "other"
    config = config.with_changes({"checkpoint.path": uri, "train.max_steps": 100_000, "data.cache": str(one / "cache")})
    (file := tmp_path / "config.toml").write_text(configs.to_toml(config), encoding="utf-8")
    root, command = locate(uri), [sys.executable, "-m", "shardlane.cli", "local", str(file), "--run-dir", str(one)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + SECONDS_MAX
        while len(list_complete(root)) < 2:
            assert process.poll() is None and time.monotonic() < end, "no two checkpoints"
            time.sleep(0.05)
    finally:
        services = [RunFolder(one).ready(name).get("pid") for name in ("coordinator", "shard-0", "shard-1", "worker-0")]
        for pid in (process.pid, *filter(None, services)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert all(services)
    stopped = max(version for version, _ in list_complete(root))

    changes = {"data.cache": str(other / "cache"), "train.stop_at_step": stopped + 3}  # a last one may have been on its way
    config = config.with_changes({**changes, "cluster.shards": 1, "cluster.stages": 2})
    with running(config, other) as cluster:
        cluster.wait()
    assert min(row["step"] for row in rows_of(other)) >= stopped, "from a checkpoint, in a folder that was empty"
    versions, digest = state_of(root)
    assert digest == train_reference(config, tokens)[0] and versions[-1] == stopped + 3 and len(versions) == 2

    capsys.readouterr()
    for target in (uri, str(other)):
        assert main(["digest", target]) == 0
        assert capsys.readouterr().out == f"{digest} {versions[-1]}\n"
        assert main(["status", target]) == 0
        assert f"{uri}/step-{versions[-1]:08d}" in capsys.readouterr().out
    out = tmp_path / "export"
    assert main(["export", uri, "--data", str(tokens.path), "--out", str(out)]) == 0
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    assert (
        main(["generate", uri, "--prompt", "def "]) == 2 and "say where the run's data are with --data" in capsys.readouterr().err
    )


def test_data_are_fetched_once_checked_and_shared(gate: Gate, prepared: tuple[Config, TokenFolder], tmp_path: Path) -> None:
    config, tokens = prepared
    fresh = config.with_changes({"data.cache": str(tmp_path)})
    fetched = open_tokens(fresh)
    assert fetched.digest == tokens.digest and fetched.path == tmp_path / tokens.digest
    assert fetched.train.windows([0, 5], 32).equal(tokens.train.windows([0, 5], 32))
    with pytest.raises(DataError, match=rf"{DATA} exists already; delete it"):
        prepare(config, locate(DATA), lambda line: None)
    gate.shut()
    gate.open()
    read_tokenizer(tokenizer_at(locate(DATA), fresh) or Path("missing"), config)

    place = locate(f"s3://{BUCKET}/damaged")
    prepare(config, place, lambda line: None)
    file = place / "train.bin"
    assert isinstance(file, ObjectPath)
    whole = file.read_bytes()
    elsewhere = config.with_changes({"data.path": str(place), "data.cache": str(tmp_path / "other")})
    changed = bytes([whole[0] ^ 1]) + whole[1:]
    for damaged, reason in ((changed, "is damaged: its SHA-256 is"), (whole[:-2], "bytes, index.json says")):
        file.remove()
        file.create(damaged)
        with pytest.raises(DataError, match=f"train.bin .*{reason}"):
            open_tokens(elsewhere)
        assert [each.name for each in (tmp_path / "other").iterdir()] == [f"{tokens.digest}.lock"]
    with pytest.raises(DataError, match=rf"there is no token folder s3://{BUCKET}/none; run `shardlane prepare --out s3://"):
        open_tokens(config.with_changes({"data.path": f"s3://{BUCKET}/none"}))
