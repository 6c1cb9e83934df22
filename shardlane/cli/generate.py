"""`shardlane generate`: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import RunFolderArgument, Step

if TYPE_CHECKING:
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config

EPILOG = """[bold]Example[/bold]

shardlane generate runs/demo --prompt 'def main(' --num-tokens 80 --temperature 0.7"""


def register(app: typer.Typer) -> None:
    app.command("generate", epilog=EPILOG)(generate)


def generate(
    run_dir: RunFolderArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the text begins with.")],
    num_tokens: Annotated[int, typer.Option("--num-tokens", min=1, help="How many tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Choose among so many of the likeliest; 0: all.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text.")] = 0,
    step: Step = None,
) -> None:
    """Go on from a prompt with the model of a checkpoint, on the CPU."""
    from shardlane.cli.run_folder import RunFolder
    from shardlane.process import prepare_process

    folder = RunFolder(run_dir)
    config = folder.config()
    _, checkpoint = folder.checkpoint(config, step)
    prepare_process(config.numerics.threads)
    print(
        generate_text(config, folder, checkpoint, prompt, num_tokens=num_tokens, temperature=temperature, top_k=top_k, seed=seed)
    )


def generate_text(
    config: Config,
    folder: RunFolder,
    checkpoint: Path,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """The prompt and what follows."""
    from shardlane.cli.export import tokenizer_file
    from shardlane.digest import read_tensors
    from shardlane.export import read_tokenizer
    from shardlane.generate import generate as generate_ids
    from shardlane.model import Stage, whole_model
    from shardlane.numerics import configure_torch
    from shardlane.partition import EMBEDDING, HEAD

    tokenizer = read_tokenizer(tokenizer_file(config, folder), config)
    configure_torch(config.numerics)
    stage = Stage.empty(config.model, whole_model(config.model), "cpu")
    tensors = dict(read_tensors(checkpoint))
    if config.model.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    stage.load_state_dict(tensors)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    found = generate_ids(
        stage, ids, num_tokens=num_tokens, seq_len=config.train.seq_len, temperature=temperature, top_k=top_k, seed=seed
    )
    text: str = tokenizer.decode([*ids, *found], skip_special_tokens=False)
    return text
