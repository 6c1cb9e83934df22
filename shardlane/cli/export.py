"""`shardlane export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import DataPlace, RunOrUri, Step

if TYPE_CHECKING:
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config
    from shardlane.storage import Location

EPILOG = """[bold]Example[/bold]

shardlane export runs/demo --out exports/demo

shardlane export s3://bucket/demo --data s3://bucket/demo-data --out exports/demo

python -c "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('exports/demo'))\""""


def register(app: typer.Typer) -> None:
    app.command("export", epilog=EPILOG)(export)


def export(
    run: RunOrUri,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; must not exist, or be empty.")],
    step: Step = None,
    data: DataPlace = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer. `transformers` loads it."""
    from shardlane.cli.run_folder import run_of

    folder = run_of(run)
    config = with_data(folder.config(), data)
    version, checkpoint = folder.checkpoint(config, step)
    export_checkpoint(config, folder, checkpoint, out)
    print(f"{out} holds version {version}")


def export_checkpoint(config: Config, folder: RunFolder, checkpoint: Location, out: Path) -> None:
    from shardlane.digest import read_tensors
    from shardlane.export import export_hugging_face

    export_hugging_face(read_tensors(checkpoint), config, tokenizer_file(config, folder), out)


def tokenizer_file(config: Config, folder: RunFolder) -> Path | None:
    """Where the run's tokenizer is, if its data are still there."""
    from shardlane.token_cache import tokenizer_at

    place = folder.data(config)
    return None if place is None else tokenizer_at(place, config)


def with_data(config: Config, data: str | None) -> Config:
    return config if data is None else config.with_changes({"data.path": data})
