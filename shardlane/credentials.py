"""What a member shows at the coordinator's door: a join token that it was given, or one that it makes with the run's secret."""

from __future__ import annotations

import secrets
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from shardlane.errors import UserError
from shardlane.join_token import CHARACTERS_MAX, mint
from shardlane.plan import Role
from shardlane.secret_file import read_secret

VALID_SECONDS = 300  # of a token that is shown at once


@dataclass(frozen=True)
class Credential:
    """With neither, nothing is shown, which is enough where the coordinator has no secret."""

    token: str = ""
    secret_file: Path | None = None

    @classmethod
    def of(cls, flags: Namespace) -> Credential:
        """As a member's `--join-…` flags say it. Raises `UserError`."""
        given = {
            flag: value
            for flag in ("join_token", "join_token_file", "join_secret_file")
            if (value := str(getattr(flags, flag)).strip())
        }
        if len(given) > 1:
            raise UserError(f"{' and '.join('--' + flag.replace('_', '-') for flag in given)} are given; one is enough")
        if file := given.get("join_secret_file"):
            read_secret(Path(file))
            return cls(secret_file=Path(file))
        if file := given.get("join_token_file"):
            return cls(_read_token(Path(file)))
        return cls(given.get("join_token", ""))

    def present(self, role: Role, readmission: str) -> str:
        """`readmission`: what an earlier answer gave, if there was one. Raises `UserError` if the secret cannot be read."""
        if self.secret_file is not None:  # a new one each time: it may be a changed secret that asks for it
            expires_seconds = int(time.time()) + VALID_SECONDS
            secret = read_secret(self.secret_file)
            return str(mint(secret, role=role, expires_seconds=expires_seconds, nonce=secrets.token_hex(16)))
        return readmission or self.token


NO_CREDENTIAL = Credential()


def _read_token(file: Path) -> str:
    try:
        with file.open(encoding="ascii") as opened:
            return opened.read(CHARACTERS_MAX + 1).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the join token {file}: {error}; `shardlane join-token` makes one") from error
