"""Where things lie: a folder, or a prefix in an object store by its URI. Pure: nothing is opened here.

runs/demo/checkpoints      file:///shared/checkpoints      s3://BUCKET/PREFIX      gs://BUCKET/PREFIX      az://CONTAINER/PREFIX
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

OBJECT_STORES = ("s3", "gs", "az")
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_SEGMENT = re.compile(r"[A-Za-z0-9_.,=+-]+")  # what every store, shell and URL takes as it is


class ObjectUri(NamedTuple):
    scheme: str
    bucket: str
    key: str  # "": the bucket itself


def check_place(text: str) -> str:
    """The place as it was given. Raises `ValueError` for a URI that is none of the above, without repeating a secret."""
    parse_place(text)
    return text


def parse_place(text: str) -> ObjectUri | str:
    """Where in which object store, or a path. Raises `ValueError` as `check_place`."""
    match = _URI.fullmatch(text)
    if match is None:
        if text.lower().startswith((*(f"{scheme}:" for scheme in OBJECT_STORES), "file:")):
            raise ValueError(f"a URI has two slashes: write {text.partition(':')[0]}://")
        return text
    scheme, rest = match[1].lower(), match[2]
    authority, _, path = rest.partition("/")
    if "@" in authority:
        raise ValueError("a URI holds no user or password; credentials come from the environment, such as AWS_ACCESS_KEY_ID")
    if scheme == "file":
        if authority not in ("", "localhost") or not path:
            raise ValueError("a file:// URI names an absolute path of this machine: write file:///folder")
        return f"/{unquote(path)}"
    if scheme not in OBJECT_STORES:
        raise ValueError(f"{scheme}:// is not known; write a folder, file:///folder, or {', '.join(_EXAMPLES)}")
    if not _BUCKET.fullmatch(authority):
        raise ValueError(f"expected {scheme}://BUCKET/PREFIX, found no name of a bucket behind {scheme}://")
    segments = path.rstrip("/").split("/") if path.rstrip("/") else []
    for segment in segments:
        if segment in (".", "..") or not _SEGMENT.fullmatch(segment):
            raise ValueError(
                f"the prefix behind {scheme}://{authority}/ has an empty segment, one of dots, or a special character"
            )
    return ObjectUri(scheme, authority, "/".join(segments))


def is_object_uri(text: str) -> bool:
    """Raises `ValueError` as `check_place`."""
    return isinstance(parse_place(text), ObjectUri)


_EXAMPLES = tuple(f"{scheme}://{'CONTAINER' if scheme == 'az' else 'BUCKET'}/PREFIX" for scheme in OBJECT_STORES)
