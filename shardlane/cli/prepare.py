"""`shardlane prepare`: text to token files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardlane.cli.arguments import ConfigCommand, ConfigFile, load_config

EPILOG = """[bold]Examples[/bold]

shardlane prepare configs/demo.toml --run-dir runs/demo    [dim]# into runs/demo/data, where `local` looks[/dim]

shardlane prepare configs/20m.toml --out data/books --data.source ~/books --data.tokenizer ~/llama/tokenizer.json

shardlane local configs/20m.toml --run-dir runs/books --data.path data/books

shardlane prepare configs/20m.toml --out s3://bucket/books    [dim]# then --data.path s3://bucket/books, on any machine[/dim]"""


def register(app: typer.Typer) -> None:
    app.command("prepare", cls=ConfigCommand, epilog=EPILOG)(prepare)


def prepare(
    context: typer.Context,
    config_file: ConfigFile,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Prepare for this run, unless it is.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR|URI", help="Make this folder, or s3://, gs://, az:// prefix; it must not exist."),
    ] = None,
) -> None:
    """Tokenize text into memory-mapped token files: what `data.source` names, or the Python standard library's own source.

    Without `data.tokenizer` a byte-level BPE of `model.vocab_size` tokens is trained on the text. `local` and `reference`
    do all this by themselves; prepare once to share a corpus between runs, or between machines.
    """
    from shardlane import prepare as preparing
    from shardlane.errors import UserError
    from shardlane.storage import locate

    config = load_config(context, config_file)
    if (run_dir is None) == (out is None):
        raise UserError("give --run-dir, or --out, and not both")
    if out is not None:
        folder = preparing.prepare(config, locate(out), print)
    else:
        assert run_dir is not None
        folder = preparing.ensure_prepared(config, run_dir, print)
    index = folder.index
    print(f"{folder.path}: {index.train.num_tokens:,} tokens to train on, {index.held_out.num_tokens:,} held out")
    print(f"vocabulary {index.vocab_size}, data hash {folder.digest}")
