"""Checkpoints in a real S3 server's bucket: whole or not there, checked, pruned; and what a person is told when it cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import obstore
import pytest
import torch
from obstore.store import MemoryStore

from shardlane import objects
from shardlane.checkpoint import CheckpointReader, PartWriter
from shardlane.digest import checkpoint_digest
from shardlane.errors import CheckpointError, UserError
from shardlane.ids import ChunkId, RunId, Version
from shardlane.manifest import (
    MANIFEST,
    check_resume,
    checkpoint_folder,
    list_complete,
    newest_complete,
    prune,
    read_manifest,
    tensor_names,
)
from shardlane.objects import ObjectPath
from shardlane.partition import Layout
from shardlane.storage import file_size, locate, open_sink, open_source
from shardlane.uris import ObjectUri
from tests.object_store import BUCKET, Gate, s3_server
from tests.shardlane.checkpoints import commit, deal, small_config, state, write_checkpoint, write_part

CONFIG = small_config()
NAMES = tensor_names("adamw")


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with s3_server() as made:
        yield made


@pytest.fixture
def root(gate: Gate, request: pytest.FixtureRequest) -> ObjectPath:
    """An empty prefix of this test's own."""
    return in_store(re.sub(r"\W+", "-", request.node.name).strip("-"))


def in_store(prefix: str) -> ObjectPath:
    place = locate(f"s3://{BUCKET}/{prefix}")
    assert isinstance(place, ObjectPath)
    return place


def change(file: ObjectPath, data: bytes) -> None:
    obstore.put(file._store, file.uri.key, data)


def keys(folder: ObjectPath) -> list[str]:
    return sorted(meta["path"].rpartition("/")[2] for batch in obstore.list(folder._store, folder.uri.key) for meta in batch)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more try, at once."""
    monkeypatch.setitem(objects._RETRIES, "max_retries", 1)
    monkeypatch.setitem(objects._RETRIES, "backoff", {**objects._RETRIES["backoff"], "init_backoff": timedelta(milliseconds=1)})


# ---- whole or not there ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_there_once_its_manifest_is(root: ObjectPath, tmp_path: Path) -> None:
    assert (list_complete(root), newest_complete(root), prune(root, 1)) == ([], None, [])
    folder = checkpoint_folder(root, Version(8))
    parts = [write_part(folder, f"shard-{index}", CONFIG, chunks) for index, chunks in enumerate(deal(CONFIG, 2))]
    assert folder.is_dir() and list_complete(root) == [] and newest_complete(root) is None
    manifest = commit(folder, CONFIG, parts, version=Version(8), optimizer_step=8)
    assert newest_complete(root) == folder and list_complete(root) == [(8, folder)]
    assert keys(folder) == [MANIFEST, "part-shard-0.safetensors", "part-shard-1.safetensors"]
    assert read_manifest(folder) == manifest
    check_resume(manifest, CONFIG, "d" * 8, "t" * 8, fork=False)

    local = write_checkpoint(tmp_path, CONFIG, version=8)
    assert checkpoint_digest(folder) == checkpoint_digest(local)
    assert (folder / parts[0].file).read_bytes() == (local / parts[0].file).read_bytes()
    with CheckpointReader(folder) as reader:
        found = list(reader.read_chunks(ChunkId(chunk) for chunk in range(len(reader.layout.chunks))))
    assert [chunk for chunk, _ in found] == [chunk.id for chunk in Layout.of(CONFIG).chunks]
    for chunk, tensors in found:
        assert all(torch.equal(tensors[name], values) for name, values in state(CONFIG, chunk).items())


def test_a_large_object_goes_in_parts_and_comes_back(root: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "UPLOAD_BYTES", 5 << 20)  # the least that S3 takes
    data, file = memoryview(os.urandom(12 << 20)), root / "large"
    sink = open_sink(file, len(data))
    for begin in range(0, len(data), 1_000_003):
        sink.write(data[begin : begin + 1_000_003], begin)
    assert not file.exists()
    sink.commit()
    assert file_size(file) == len(data) and file.read_bytes() == data
    source, piece = open_source(file), bytearray(300)
    assert source.read(memoryview(piece), 5_242_800) == 300 and piece == data[5_242_800:5_243_100]
    assert source.read(memoryview(piece), len(data) - 7) == 7 and piece[:7] == data[-7:]
    assert source.read(memoryview(piece), len(data) + 7) == 0
    with pytest.raises(ValueError, match="expected byte 0, found 8"):
        open_sink(root / "other", 8).write(data[:8], 8)


def test_nothing_is_left_of_an_upload_that_was_given_up(root: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "UPLOAD_BYTES", 5 << 20)
    sizes = {ChunkId(0): 1 << 20, ChunkId(1): 1 << 20}
    with PartWriter(root, "a", sizes, NAMES) as writer:
        writer.add(ChunkId(0), dict.fromkeys(NAMES, torch.zeros(1 << 20)))  # 12 MiB: two parts are up
    assert keys(root) == []
    with (
        pytest.raises(ValueError, match="an object is written from its beginning"),
        PartWriter(root, "a", sizes, NAMES) as writer,
    ):
        writer.add(ChunkId(1), dict.fromkeys(NAMES, torch.zeros(1 << 20)))
    assert keys(root) == []


def test_a_writer_killed_at_any_point_leaves_no_checkpoint(root: ObjectPath) -> None:
    older = write_checkpoint(root, CONFIG, version=2)
    code = f"""
import os
from shardlane import objects
from shardlane.ids import Version
from shardlane.manifest import checkpoint_folder
from shardlane.storage import locate, open_sink
from tests.shardlane.checkpoints import deal, small_config, write_part
objects.UPLOAD_BYTES = 5 << 20
folder = checkpoint_folder(locate("{root}"), Version(4))
write_part(folder, "whole", small_config(), deal(small_config(), 2)[0])
sink = open_sink(folder / "part-half.safetensors", 20 << 20)
for begin in range(0, 12 << 20, 1 << 20):
    sink.write(memoryview(bytes(1 << 20)), begin)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 9, done.stderr
    assert keys(checkpoint_folder(root, Version(4))) == ["part-whole.safetensors"]
    assert newest_complete(root) == older and list_complete(root) == [(2, older)]
    newest = write_checkpoint(root, CONFIG, version=6)
    assert prune(root, keep_last=2) == [checkpoint_folder(root, Version(4))], "torn, and older than the newest"
    assert [folder for _, folder in list_complete(root)] == [older, newest]


def test_of_two_who_commit_the_first_has(root: ObjectPath) -> None:
    folder = checkpoint_folder(root, Version(100))
    one, two = (write_part(folder, owner, CONFIG, deal(CONFIG, 1)[0]) for owner in ("one", "two"))
    first = commit(folder, CONFIG, [one])
    assert commit(folder, CONFIG, [one]) == first, "the answer to our own request was lost"
    before = (folder / MANIFEST).read_bytes()
    commit(folder, CONFIG, [two])  # the coordinator before us, on the same timeline: what it committed counts
    for facts in ({"timeline": 4}, {"run_id": RunId("r2")}):
        with pytest.raises(CheckpointError, match=r"step-00000100 holds version 100 of run r1, timeline 3, already; it stays"):
            commit(folder, CONFIG, [two], **facts)
    assert (folder / MANIFEST).read_bytes() == before and read_manifest(folder) == first


# ---- damage, and retention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"does not match its checksum"),
        (lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:], r"its header "),
        (lambda data: data[:-4], r"it has \d+ bytes, expected \d+"),
        (None, "it is missing"),
    ],
    ids=["last-byte", "header", "truncated", "missing"],
)
def test_a_damaged_part_is_refused_by_name(root: ObjectPath, harm: Callable[[bytes], bytes] | None, reason: str) -> None:
    file = write_checkpoint(root, CONFIG) / "part-shard-1.safetensors"
    if harm is None:
        file.remove()
    else:
        change(file, harm(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))} is damaged: .*{reason}"):
        checkpoint_digest(file.parent)


def test_a_part_that_shrinks_after_it_was_opened(root: ObjectPath) -> None:
    file = write_checkpoint(root, CONFIG, num_parts=1) / "part-shard-0.safetensors"
    with CheckpointReader(file.parent) as reader:
        change(file, file.read_bytes()[:4])
        with pytest.raises(CheckpointError, match="it ends at byte 4"):
            reader.read_chunk(ChunkId(0))


def test_a_damaged_manifest_is_refused_and_no_older_one_taken(root: ObjectPath) -> None:
    write_checkpoint(root, CONFIG, version=2)
    file = write_checkpoint(root, CONFIG, version=4) / MANIFEST
    values = json.loads(file.read_bytes())
    change(file, json.dumps({**values, "timeline": 9}, indent=1).encode())
    with pytest.raises(CheckpointError, match=r"step-00000004/manifest.json is damaged: it does not match its own checksum"):
        newest_complete(root)


def test_the_manifest_goes_before_the_parts(root: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_checkpoint(root, CONFIG, version=version) for version in (2, 4, 6)]
    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "remove_all", lambda self: (_ for _ in ()).throw(OSError(5, "the store answers 500")))
        with pytest.raises(CheckpointError, match=r"cannot remove the old .*step-00000002: the store answers 500"):
            prune(root, keep_last=2)
    assert keys(folders[0]) == ["part-shard-0.safetensors", "part-shard-1.safetensors"]
    assert [version for version, _ in list_complete(root)] == [4, 6]
    assert prune(root, keep_last=2) == [folders[0]] and keys(folders[0]) == []


def test_a_store_that_minds_what_is_not_there_is_pruned_as_well() -> None:
    root = ObjectPath(ObjectUri("gs", "bucket", "run"), MemoryStore())
    torn, kept = checkpoint_folder(root, Version(2)), write_checkpoint(root, CONFIG, version=4)
    write_part(torn, "a", CONFIG, deal(CONFIG, 1)[0])
    assert prune(root, keep_last=1) == [torn] and list_complete(root) == [(4, kept)]
    assert len(checkpoint_digest(kept)) == 64


@pytest.mark.usefixtures("impatient")
def test_while_the_store_is_away_nothing_is_taken_for_torn(gate: Gate, root: ObjectPath, request: pytest.FixtureRequest) -> None:
    folders = [write_checkpoint(root, CONFIG, version=version) for version in (2, 4)]
    away = in_store(root.uri.key)
    gate.shut()
    try:
        for call in (lambda: newest_complete(away), lambda: prune(away, 1), lambda: write_checkpoint(away, CONFIG, version=6)):
            with pytest.raises(CheckpointError, match=r"the store cannot be reached; check the network and AWS_ENDPOINT_URL"):
                call()
    finally:
        gate.open()
    assert [folder for _, folder in list_complete(root)] == folders
    assert prune(root, 1) == [folders[0]]


# ---- what a person is told ---------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(gate: Gate) -> None:
    place = locate("s3://no-such-bucket/run")
    with pytest.raises(CheckpointError) as caught:
        newest_complete(place)
    assert str(caught.value) == (
        "cannot read the checkpoints in s3://no-such-bucket/run: there is no s3://no-such-bucket; make it, or name another"
    )
    with pytest.raises(CheckpointError) as caught:
        write_part(checkpoint_folder(place, Version(2)), "a", CONFIG, deal(CONFIG, 1)[0])
    assert str(caught.value) == (
        "cannot write s3://no-such-bucket/run/step-00000002/part-a.safetensors: there is no s3://no-such-bucket; make it, or"
        " name another; this checkpoint is not taken, the next one is tried"
    )


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (
            403,
            "SignatureDoesNotMatch",
            r"access is denied \(the store answers 403 SignatureDoesNotMatch\); check AWS_ACCESS_KEY_ID, ",
        ),
        (503, "SlowDown", r"the store answers 503 SlowDown"),
        (501, "NotImplemented", r"the store cannot make an object only if there is none \(If-None-Match\)"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_what_the_store_says_is_told_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, reason: str
) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = f"<Error><Code>{code}</Code><AWSAccessKeyId>hunter2</AWSAccessKeyId></Error>".encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hunter2")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        with pytest.raises(OSError, match=r".") as caught:
            in_store("run").create(b"x")
        server.shutdown()
    told = caught.value.strerror
    assert re.match(reason, told) and "\n" not in told and "hunter2" not in told


def test_a_store_that_the_environment_does_not_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(
        UserError, match=r"cannot use az://container: .*Account must be specified; set AZURE_STORAGE_ACCOUNT_NAME"
    ):
        locate("az://container/run")
    assert str(locate("gs://bucket/run")) == "gs://bucket/run"


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    assert locate(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
