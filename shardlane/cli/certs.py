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

Give each machine ca.pem and the two files of its role. [bold]ca.key[/bold] signs whatever it is asked to: keep it elsewhere.

In Kubernetes a Job runs `shardlane certs --kubernetes-secrets shardlane` (deploy/k8s/base/certificates.yaml)."""


def register(app: typer.Typer) -> None:
    app.command("certs", epilog=EPILOG)(certs)


def certs(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Where the files are, or will be: ca.pem, ca.key, ROLE.pem, ROLE.key, join.secret.", show_default=False
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long a role's certificate is good.")] = 365,
    prefix: Annotated[
        str,
        typer.Option(
            "--kubernetes-secrets",
            metavar="PREFIX",
            help="Fill the Secrets PREFIX-ROLE-tls and PREFIX-join of this pod's namespace.",
        ),
    ] = "",
    join_secret_only: Annotated[
        bool,
        typer.Option(
            "--join-secret-only", help="Of the Secrets only PREFIX-join: the certificates are another's, cert-manager's."
        ),
    ] = False,
) -> None:
    """Make certificates for mutual TLS: an authority, and a certificate for each role (coordinator, shard, worker, operator).
    Beside them a secret for `shardlane join-token`.

    An authority that is there is used again, so this renews, too: services take up new files for new connections by themselves.
    Of Secrets only those are filled that need it: empty ones, and those with less than a third of their time left.
    """
    from shardlane.certificates import write_certificates
    from shardlane.errors import UserError
    from shardlane.kubernetes import SecretStore, fill_join_secret, fill_secrets
    from shardlane.tls import ROLES

    if (folder is None) == (not prefix):
        raise UserError("give a folder, or --kubernetes-secrets, and not both")
    if join_secret_only and not prefix:
        raise UserError("--join-secret-only is for --kubernetes-secrets; a folder gets the secret beside its certificates")
    if folder is not None:
        write_certificates(folder, days=days)
        print(f"{folder}: certificates for {', '.join(ROLES)}, good for {days} days")
        return
    store = SecretStore.of_pod()
    lines = [] if join_secret_only else fill_secrets(store, prefix, days=days)
    lines += fill_join_secret(store, prefix)
    good = "the secret for join tokens is there" if join_secret_only else f"the certificates of {', '.join(ROLES)} are good"
    print("\n".join(lines) or f"{prefix}: {good}")
