"""`shardlane join-token`: lets one newcomer in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/bold]

shardlane join-token --secret certs/join.secret --role worker > token

python -m worker_service --coordinator 10.0.0.5:7070 --join-token-file token

A token is good for one process, once. Machines of your own get the secret itself (--join-secret-file): they make a token of \
their own whenever they start."""


class JoiningRole(StrEnum):
    WORKER = "worker"
    SHARD = "shard"


def register(app: typer.Typer) -> None:
    app.command("join-token", epilog=EPILOG)(join_token)


def join_token(
    secret: Annotated[
        Path,
        typer.Option(
            "--secret",
            metavar="FILE",
            envvar="SHARDLANE_JOIN_SECRET_FILE",
            help="The run's secret, which the coordinator has, too.",
        ),
    ],
    role: Annotated[JoiningRole, typer.Option("--role", help="What the newcomer will be.")] = JoiningRole.WORKER,
    valid_for: Annotated[str, typer.Option("--valid-for", metavar="TIME", help="Such as 90s, 10m, 2h or 7d, the most.")] = "10m",
) -> None:
    """Print a token with which one process may join the run, until it expires."""
    import secrets
    import time

    from shardlane.join_token import mint, seconds_of
    from shardlane.secret_file import read_secret

    expires_seconds = int(time.time()) + seconds_of(valid_for)
    print(mint(read_secret(secret), role=role.value, expires_seconds=expires_seconds, nonce=secrets.token_hex(16)))
