"""`shardlane digest`: the SHA-256 of a checkpoint's weights and moments."""

from __future__ import annotations

import typer

from shardlane.cli.arguments import RunFolderArgument, Step

EPILOG = """[bold]Example[/bold]

shardlane digest runs/tiny --step 8"""


def register(app: typer.Typer) -> None:
    app.command("digest", epilog=EPILOG)(digest)


def digest(run_dir: RunFolderArgument, step: Step = None) -> None:
    """Print the SHA-256 of a checkpoint, then its step. Equal digests: equal weights and optimizer, bit for bit.

    It says nothing of how many shards wrote the checkpoint, so it compares runs of any shape. Every byte is verified on the way.
    """
    from shardlane.cli.run_folder import RunFolder
    from shardlane.digest import checkpoint_digest

    folder = RunFolder(run_dir)
    version, checkpoint = folder.checkpoint(folder.config(), step)
    print(f"{checkpoint_digest(checkpoint)} {version}")
