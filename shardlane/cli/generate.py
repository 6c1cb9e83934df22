"""`shardlane generate`: text from a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import DataPlace, RunOrUri, Step

if TYPE_CHECKING:
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config
    from shardlane.storage import Location

EPILOG = """[bold]Example[/bold]

shardlane generate runs/demo --prompt 'def main(' --num-tokens 80 --temperature 0.7"""


def register(app: typer.Typer) -> None:
    app.command("generate", epilog=EPILOG)(generate)


def generate(
    run: RunOrUri,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the text begins with.")],
    num_tokens: Annotated[int, typer.Option("--num-tokens", min=1, help="How many tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Choose among so many of the likeliest; 0: all.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text.")] = 0,
    step: Step = None,
    data: DataPlace = None,
) -> None:
    """Go on from a prompt with the model of a checkpoint, on the CPU."""
    from shardlane.cli.export import with_data
    from shardlane.cli.run_folder import run_of
    from shardlane.process import prepare_process

    folder = run_of(run)
    config = with_data(folder.config(), data)
    _, checkpoint = folder.checkpoint(config, step)
    prepare_process(config.numerics.threads)
    print(
        generate_text(config, folder, checkpoint, prompt, num_tokens=num_tokens, temperature=temperature, top_k=top_k, seed=seed)
    )


def generate_text(
    config: Config,
    folder: RunFolder,
    checkpoint: Location,
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
    from shardlane.errors import DataError
    from shardlane.export import read_tokenizer
    from shardlane.generate import generate as generate_ids
    from shardlane.model import Stage, whole_model
    from shardlane.numerics import configure_torch
    from shardlane.partition import EMBEDDING, HEAD

    file = tokenizer_file(config, folder)
    if file is None:
        raise DataError(
            f"there is no tokenizer in {folder.data(config) or 'a checkpoint'}; say where the run's data are with --data"
        )
    tokenizer = read_tokenizer(file, config)
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
