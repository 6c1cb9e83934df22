"""Which places a config may name, and that a password in one is neither taken nor repeated."""

from __future__ import annotations

import pytest

from shardlane.config import build
from shardlane.errors import ConfigError
from shardlane.uris import ObjectUri, is_object_uri, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""),
        ("runs/demo", "runs/demo"),
        ("~/a b/c", "~/a b/c"),
        ("file:///shared/a%20b", "/shared/a b"),
        ("file://localhost/shared", "/shared"),
        ("s3://bucket", ObjectUri("s3", "bucket", "")),
        ("S3://bucket/a/b.c_d-e/", ObjectUri("s3", "bucket", "a/b.c_d-e")),
        ("gs://my_bucket/run=1", ObjectUri("gs", "my_bucket", "run=1")),
        ("az://container/run", ObjectUri("az", "container", "run")),
    ],
)
def test_places(text: str, place: object) -> None:
    assert parse_place(text) == place
    assert is_object_uri(text) is isinstance(place, ObjectUri)
    assert build({"checkpoint": {"path": text}, "data": {"path": text}}).checkpoint.path == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://key:hunter2@bucket/run", "a URI holds no user or password; credentials come from the environment"),
        ("s3://key:hunter2/x@bucket/run", "found no name of a bucket behind s3://"),
        ("s3://bucket/run?X-Amz-Signature=hunter2", "an empty segment, one of dots, or a special character"),
        ("ftp://bucket/hunter2", "ftp:// is not known; write a folder, file:///folder, or s3://BUCKET/PREFIX"),
        ("s3:/bucket/run", "a URI has two slashes: write s3://"),
        ("s3:///run", "found no name of a bucket"),
        ("s3://bucket/a//b", "an empty segment"),
        ("s3://bucket/../other", "one of dots"),
        ("file://server/share", "names an absolute path of this machine: write file:///folder"),
        ("file://", "write file:///folder"),
    ],
)
@pytest.mark.parametrize("section", ["checkpoint", "data"])
def test_what_is_none_is_refused_in_one_line(text: str, reason: str, section: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({section: {"path": text}})
    message = str(caught.value)
    assert message.startswith(f"{section}.path: ") and reason in message and "\n" not in message
    assert "hunter2" not in message
