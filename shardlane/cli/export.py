"""`shardlane export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import RunFolderArgument, Step

if TYPE_CHECKING:
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config

EPILOG = """[bold]Example[/bold]

shardlane export runs/demo --out exports/demo

python -c "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('exports/demo'))\""""


def register(app: typer.Typer) -> None:
    app.command("export", epilog=EPILOG)(export)


def export(
    run_dir: RunFolderArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; must not exist, or be empty.")],
    step: Step = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer. `transformers` loads it."""
    from shardlane.cli.run_folder import RunFolder

    folder = RunFolder(run_dir)
    config = folder.config()
    version, checkpoint = folder.checkpoint(config, step)
    export_checkpoint(config, folder, checkpoint, out)
    print(f"{out} holds version {version}")


def export_checkpoint(config: Config, folder: RunFolder, checkpoint: Path, out: Path) -> None:
    from shardlane.digest import read_tensors
    from shardlane.export import export_hugging_face

    tokenizer = tokenizer_file(config, folder)
    export_hugging_face(read_tensors(checkpoint), config, tokenizer if tokenizer.is_file() else None, out)


def tokenizer_file(config: Config, folder: RunFolder) -> Path:
    """Where the run's tokenizer is, if its data is still there."""
    from shardlane.data import TOKENIZER_FILE
    from shardlane.prepare import prepared_folder

    return prepared_folder(config, folder.path) / TOKENIZER_FILE
