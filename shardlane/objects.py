"""Objects in S3, Google Cloud Storage and Azure, by the one library that speaks them all (obstore).

Endpoints and credentials come from each store's own environment variables, which obstore reads: they are in no config, and an
error names neither. Every failure is an `OSError` whose `strerror` is one line that says what to do. The library tries again,
for a bounded time; none of these calls holds the interpreter's lock while it waits.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import AzureStore, GCSStore, S3Store

from shardlane.errors import UserError
from shardlane.uris import ObjectUri

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

UPLOAD_BYTES = 8 << 20  # of a part of a multipart upload, at least
UPLOAD_PARTS_MAX = 9_000  # S3 takes 10,000
WHOLE_BYTES_MAX = 1 << 30  # of what is read at once: indexes and manifests
UPLOADS_AT_ONCE = 2  # so three parts are in memory, however large the object
# One that refuses connections costs a call some five seconds, one that hangs half a minute.
_RETRIES: RetryConfig = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=25),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
# `allow_http`: an endpoint of http:// is used where one is set, and nowhere else.
_CLIENT: ClientConfig = {"timeout": timedelta(seconds=30), "connect_timeout": timedelta(seconds=5), "allow_http": True}
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
# How stores say that they have no such bucket: S3, Azure, GCS.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist")


@dataclass(frozen=True)
class ObjectPath:
    """An object, or a prefix that stands for a folder. Its methods are named as `pathlib.Path`'s where they do the same."""

    uri: ObjectUri
    _store: ObjectStore = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.uri.scheme}://{self.uri.bucket}/{self.uri.key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return replace(self, uri=self.uri._replace(key=f"{self.uri.key}/{name}".lstrip("/")))

    @property
    def name(self) -> str:
        return self.uri.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return replace(self, uri=self.uri._replace(key=self.uri.key.rpartition("/")[0]))

    def exists(self) -> bool:
        """As an object. Unlike `Path.exists` it raises `OSError` where that cannot be known."""
        try:
            self.num_bytes()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether any object lies below."""
        with self._told():
            return any(batch for batch in obstore.list(self._store, f"{self.uri.key}/", chunk_size=1))

    def folders(self) -> list[ObjectPath]:
        with self._told():
            prefixes = obstore.list_with_delimiter(self._store, self.uri.key or None)["common_prefixes"]
        return [self / prefix.rstrip("/").rpartition("/")[2] for prefix in prefixes]

    def num_bytes(self) -> int:
        with self._told():
            return int(obstore.head(self._store, self.uri.key)["size"])

    def read_bytes(self) -> bytes:
        """All of it, up to `WHOLE_BYTES_MAX`."""
        with self._told():
            found = obstore.get(self._store, self.uri.key)
            if (num_bytes := found.meta["size"]) <= WHOLE_BYTES_MAX:
                return bytes(found.bytes())
        raise OSError(errno.EFBIG, f"it has {num_bytes} bytes, and may have {WHOLE_BYTES_MAX}")

    def read_range(self, offset: int, num_bytes: int) -> memoryview:
        """Fewer bytes where the object ends before."""
        with self._told():
            try:
                return memoryview(obstore.get_range(self._store, self.uri.key, start=offset, length=num_bytes))
            except BaseError as error:
                if _status(str(error)) == "416":
                    return memoryview(b"")
                raise

    def create(self, data: bytes) -> None:
        """Raises `FileExistsError` if there is such an object: of two who create it, one does."""
        with self._told():
            obstore.put(self._store, self.uri.key, data, mode="create", use_multipart=False)

    def remove(self) -> None:
        """Harmless if it is not there, as S3 has it and others have not."""
        with suppress(FileNotFoundError), self._told():
            obstore.delete(self._store, self.uri.key)

    def remove_all(self) -> None:
        """Every object below."""
        with self._told():
            for batch in obstore.list(self._store, f"{self.uri.key}/", chunk_size=1000):
                obstore.delete(self._store, [meta["path"] for meta in batch])

    def upload(self, num_bytes: int) -> Upload:
        return Upload(self, num_bytes)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> OSError:
        text = " ".join(str(error).split())
        code = _first(r"<Code>(\w{1,64})</Code>", text)
        status, variables = _status(text), _VARIABLES[self.uri.scheme]
        network = "the network and AWS_ENDPOINT_URL" if self.uri.scheme == "s3" else "the network"
        if isinstance(error, AlreadyExistsError):
            return FileExistsError(errno.EEXIST, "it exists already")
        if _NO_BUCKET.search(text):
            bucket = f"{self.uri.scheme}://{self.uri.bucket}"
            return OSError(errno.ENXIO, f"there is no {bucket}; make it, or name another")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, "there is no such object")
        if status in ("401", "403") or "169.254.169.254" in text:
            said = f"the store answers {status} {code}".rstrip() if status in ("401", "403") else "there are no credentials"
            return PermissionError(errno.EACCES, f"access is denied ({said}); check {variables}, and who may use the bucket")
        if isinstance(error, NotSupportedError) or status == "501":
            return OSError(
                errno.ENOTSUP, "the store cannot make an object only if there is none (If-None-Match); use one that can"
            )
        if "kind: Timeout" in text:
            return TimeoutError(errno.ETIMEDOUT, f"the store does not answer in time; check {network}")
        if "HTTP error" in text:
            return ConnectionError(errno.ECONNREFUSED, f"the store cannot be reached; check {network}")
        if status:
            return OSError(errno.EIO, f"the store answers {status} {code}".rstrip())
        first = re.sub(r"\?\S*", "?…", text.partition(" Debug source")[0])  # a query may carry a signature
        return OSError(errno.EIO, first[:300])


class Upload:
    """An object under way: it is there, whole, when `commit` returns, and until then not at all. For one thread at a time.

    Raises `OSError`. One that is neither committed nor aborted, since its process died, stays in the store as parts that are no
    object and cost money: a lifecycle rule of the bucket (abort incomplete multipart uploads) removes them.
    """

    def __init__(self, path: ObjectPath, num_bytes: int) -> None:
        self._path, self._end = path, 0
        size = max(UPLOAD_BYTES, -(-num_bytes // UPLOAD_PARTS_MAX))
        with path._told():
            self._writer: Any = obstore.open_writer(path._store, path.uri.key, buffer_size=size, max_concurrency=UPLOADS_AT_ONCE)

    def write(self, data: memoryview, offset: int) -> None:
        """`data` is free to change when this returns."""
        if offset != self._end:
            raise ValueError(f"an object is written from its beginning to its end: expected byte {self._end}, found {offset}")
        with self._path._told():
            self._writer.write(data)
        self._end += len(data)

    def commit(self) -> None:
        with self._path._told():
            self._writer.close()
        self._writer = None

    def abort(self) -> None:
        """Takes back what is not committed, if the store lets it. May be called more than once."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(BaseError, OSError, _AbortedError), writer:
                raise _AbortedError


class _AbortedError(Exception):
    """Tells an obstore writer, by leaving its context, that what it has is not to be kept."""


def open_store(uri: ObjectUri) -> ObjectPath:
    """Raises `UserError` where the environment does not say what the store needs; nothing is asked of the store yet."""
    try:
        if uri.scheme == "s3":
            return ObjectPath(uri, S3Store(uri.bucket, client_options=_CLIENT, retry_config=_RETRIES))
        if uri.scheme == "gs":
            return ObjectPath(uri, GCSStore(uri.bucket, client_options=_CLIENT, retry_config=_RETRIES))
        return ObjectPath(uri, AzureStore(uri.bucket, client_options=_CLIENT, retry_config=_RETRIES))
    except (BaseError, ValueError) as error:
        reason = " ".join(str(error).partition("Debug source")[0].split())
        raise UserError(f"cannot use {uri.scheme}://{uri.bucket}: {reason}; set {_VARIABLES[uri.scheme]}") from error


def _status(text: str) -> str:
    return _first(r"status code: (\d{3})", text)


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
