"""`shardlane status`: where a run stands."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from shardlane.cli.arguments import Certs, RunTargetOrUri

EPILOG = """[bold]Examples[/bold]

shardlane status runs/demo

shardlane status s3://bucket/demo

shardlane status 10.0.0.5:7070 --json | jq .members[].metricsAddress"""

POINTS = 512
WIDTH_OFF_TERMINAL = 160


def register(app: typer.Typer) -> None:
    app.command("status", epilog=EPILOG)(status)


def status(
    target: RunTargetOrUri,
    json: Annotated[bool, typer.Option("--json", help="All that the coordinator says, as JSON.")] = False,
    certs: Certs = None,
) -> None:
    """Show where a run stands: its step and loss, who runs which stage and lanes, which shard holds how much, what has happened.

    A run that nobody serves is described from its folder; of the URI of checkpoints they are listed.
    """
    from google.protobuf.json_format import MessageToJson

    from shardlane.cli.client import CoordinatorClient, address_of, network_of
    from shardlane.cli.screen import Paint, lines_of
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
            response = client.status(points=POINTS)
    except UnreachableError as error:
        if address == target:
            raise
        print(error, file=sys.stderr)  # it was killed, or its machine is another one
        _describe_folder(Path(target))
        return
    if json:
        print(MessageToJson(response, always_print_fields_with_no_presence=True))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_OFF_TERMINAL
    print("\n".join(lines_of(response, width=width, paint=Paint(sys.stdout.isatty()))))


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
