"""`shardlane status`: where a run stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shardlane.cli.arguments import Certs, RunTargetOrUri

EPILOG = """[bold]Examples[/bold]

shardlane status runs/demo

shardlane status s3://bucket/demo

shardlane status 10.0.0.5:7070 --json | jq .members[].metricsAddress"""


def register(app: typer.Typer) -> None:
    app.command("status", epilog=EPILOG)(status)


def status(
    target: RunTargetOrUri,
    json: Annotated[bool, typer.Option("--json", help="All that the coordinator says, as JSON.")] = False,
    certs: Certs = None,
) -> None:
    """Show where a run stands: its step and loss, who runs which stage and lanes, which shard holds how much.

    A run that nobody serves is described from its folder; of the URI of checkpoints they are listed.
    """
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from shardlane.cli.client import CoordinatorClient, address_of, network_of
    from shardlane.cli.live import Picture
    from shardlane.errors import UnreachableError

    if "://" in target:
        _describe_checkpoints(target)
        return
    address = address_of(target)
    if address is None:
        _describe_folder(Path(target))
        return
    try:
        with CoordinatorClient(address, network_of(certs)) as client:
            response = client.status()
    except UnreachableError as error:
        if address == target:
            raise
        print(error, file=sys.stderr)  # it was killed, or its machine is another one
        _describe_folder(Path(target))
        return
    if json:
        print(MessageToJson(response, always_print_fields_with_no_presence=True))
        return
    picture = Picture(int(response.last_step))
    picture.status = response
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(picture)
    newest = response.newest
    if response.version:
        console.print(
            f"loss {newest.loss:.4f}  grad_norm {newest.grad_norm:.3f}  lr {newest.learning_rate:.2e}"
            f"  tokens/s {response.tokens_per_second:,.0f}  checkpoint {response.newest_checkpoint or 'none yet'}",
            highlight=False,
        )


def _describe_folder(path: Path) -> None:
    from shardlane.cli.ending import print_ending
    from shardlane.cli.run_folder import RunFolder

    folder = RunFolder(path)
    config = folder.config()
    print(f"{path} is not running")
    print_ending(config, folder, sample=False)


def _describe_checkpoints(uri: str) -> None:
    from shardlane.cli.run_folder import run_of
    from shardlane.manifest import list_complete, read_manifest
    from shardlane.storage import locate

    _, newest = run_of(uri).checkpoint(run_of(uri).config())
    manifest = read_manifest(newest)
    num_bytes = sum(part.num_bytes for part in manifest.parts)
    print(
        f"run {manifest.run_id}, timeline {manifest.timeline}: {newest}, {num_bytes / 1e6:,.1f} MB in {len(manifest.parts)} parts"
    )
    print(f"complete: {', '.join(str(version) for version, _ in list_complete(locate(uri)))}")
