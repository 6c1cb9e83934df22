"""`shardlane digest`: the SHA-256 of a checkpoint's weights and moments."""

from __future__ import annotations

import typer

from shardlane.cli.arguments import RunOrUri, Step

EPILOG = """[bold]Example[/bold]

shardlane digest runs/tiny --step 8

shardlane digest s3://bucket/tiny"""


def register(app: typer.Typer) -> None:
    app.command("digest", epilog=EPILOG)(digest)


def digest(run: RunOrUri, step: Step = None) -> None:
    """Print the SHA-256 of a checkpoint, then its step. Equal digests: equal weights and optimizer, bit for bit.

    It says nothing of how many shards wrote the checkpoint, so it compares runs of any shape. Every byte is verified on the way.
    """
    from shardlane.cli.run_folder import run_of
    from shardlane.digest import checkpoint_digest

    folder = run_of(run)
    version, checkpoint = folder.checkpoint(folder.config(), step)
    print(f"{checkpoint_digest(checkpoint)} {version}")
