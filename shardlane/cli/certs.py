"""`shardlane certs`: an authority and a certificate for each role, for development and small clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/bold]

shardlane certs certs

python -m ps_service --coordinator 10.0.0.5:7070 --bind 10.0.0.6:7071 --ssl-ca-certfile certs/ca.pem
--ssl-certfile certs/shard.pem --ssl-keyfile certs/shard.key

shardlane status 10.0.0.5:7070 --certs certs

Give each machine ca.pem and the two files of its role. [bold]ca.key[/bold] signs whatever it is asked to: keep it elsewhere."""


def register(app: typer.Typer) -> None:
    app.command("certs", epilog=EPILOG)(certs)


def certs(
    folder: Annotated[Path, typer.Argument(help="Where the files are, or will be: ca.pem, ca.key, ROLE.pem, ROLE.key.")],
    days: Annotated[int, typer.Option(min=1, help="How long a role's certificate is good.")] = 365,
) -> None:
    """Make certificates for mutual TLS: an authority, and a certificate for each role (coordinator, shard, worker, operator).

    An authority that is there is used again, so this renews, too: services take up new files for new connections by themselves.
    """
    from shardlane.certificates import write_certificates
    from shardlane.tls import ROLES

    write_certificates(folder, days=days)
    print(f"{folder}: certificates for {', '.join(ROLES)}, good for {days} days")
