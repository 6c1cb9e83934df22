"""Secrets that lie in files: read again whenever they are needed, so that one is renewed without a restart."""

from __future__ import annotations

import secrets
from pathlib import Path

from shardlane.errors import UserError
from shardlane.files import replace_file

CHARACTERS_MIN = 32  # 128 bits in hex
_BYTES_MAX = 4096


def read_secret(file: Path) -> bytes:
    """Without the white space around it. Raises `UserError`."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_BYTES_MAX + 1)
    except OSError as error:
        raise UserError(f"cannot read the secret {file}: {error.strerror}; name a file of {CHARACTERS_MIN} characters") from error
    secret = content.strip()
    if not CHARACTERS_MIN <= len(secret) <= _BYTES_MAX:
        raise UserError(
            f"the secret in {file} has {len(secret)} bytes; expected {CHARACTERS_MIN} to {_BYTES_MAX}, such as"
            f" `openssl rand -hex {CHARACTERS_MIN}` makes"
        )
    return secret


def new_secret() -> bytes:
    """256 bits in hex, and the end of the line."""
    return f"{secrets.token_hex(32)}\n".encode()


def ensure_secret(file: Path) -> None:
    """Makes one, for its owner alone, unless the file is there. Raises `OSError`."""
    if not file.exists():
        replace_file(file, new_secret(), mode=0o600)
