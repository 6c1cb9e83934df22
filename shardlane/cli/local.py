"""`shardlane local`: a whole cluster on this machine, from data to checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import ConfigCommand, ConfigFile, ForkRun, Replicas, RunDir, Shards, Stages, load_config

if TYPE_CHECKING:
    from shardlane.cli.cluster import Attendant, Commands
    from shardlane.cli.live import View
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config
    from shardlane.data import TokenFolder

EPILOG = """[bold]Examples[/bold]

shardlane local configs/tiny.toml --run-dir runs/tiny

shardlane local configs/demo.toml --run-dir runs/demo --stages 4 --replicas 1 --optimizer.learning_rate 1e-3

shardlane local configs/demo.toml --run-dir runs/demo --checkpoint.path s3://bucket/demo    [dim]# docs/object-storage.md[/dim]

Any setting of the config is an option, --section.key value. Stages, replicas, shards and logging may differ each time that a \
run is taken up again; what would change the mathematics is refused, unless --fork-run."""


def register(app: typer.Typer) -> None:
    app.command("local", cls=ConfigCommand, epilog=EPILOG)(local)


def local(
    context: typer.Context,
    config_file: ConfigFile,
    run_dir: RunDir,
    stages: Stages = None,
    replicas: Replicas = None,
    shards: Shards = None,
    fork_run: ForkRun = False,
    control_token_file: Annotated[
        Path | None,
        typer.Option(
            "--control-token-file", metavar="FILE", help="Who has the token in it may steer the run by the status page."
        ),
    ] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--no-sample", help="End with generated text and an export; default: on a terminal.")
    ] = None,
) -> None:
    """Train on this machine: one coordinator, S shards, P x R workers, each a process of its own.

    Prepares the data if there is none, goes on from the newest checkpoint if there is one, and shows the run as it trains.
    Ctrl-C once stops after the present step with a checkpoint, twice at once. No process outlives this one.
    """
    from shardlane.cli.run_folder import RunFolder

    flags = {"cluster.stages": stages, "cluster.replicas": replicas, "cluster.shards": shards}
    config = load_config(context, config_file, flags)
    with_sample = sys.stdout.isatty() if sample is None else sample
    raise typer.Exit(train(config, RunFolder(run_dir), fork=fork_run, with_sample=with_sample, token_file=control_token_file))


def train(config: Config, folder: RunFolder, *, fork: bool, with_sample: bool, token_file: Path | None = None) -> int:
    """The exit status."""
    from shardlane.cli.ending import print_ending
    from shardlane.cli.live import choose_view

    with folder.lock():
        if not fork and is_finished(config, folder):
            print(f"{folder.path} is finished: step {config.train.last_step} is done; raise train.max_steps, or --fork-run")
            print_ending(config, folder, sample=with_sample)
            return 0
        with choose_view(every_steps=config.log.every_steps, last_step=config.train.last_version) as view:
            open_data(config, folder, view.note)
            resolved = resolve(config, folder)
            flags = [] if token_file is None else ["--control-token-file", str(token_file.absolute())]
            status, complaint = run_cluster(
                resolved, folder, view, fork=fork, arrange=lambda commands: commands.with_coordinator(*flags)
            )
        print(*complaint, sep="\n", end="\n" if complaint else "", file=sys.stderr, flush=True)
        if status == 0:
            print_ending(resolved, folder, sample=with_sample)
        return status


def run_cluster(
    config: Config,
    folder: RunFolder,
    view: View,
    *,
    fork: bool = False,
    attendant: Attendant | None = None,
    arrange: Callable[[Commands], Commands] = lambda commands: commands,
) -> tuple[int, list[str]]:
    """The exit status, and lines for stderr once the view is closed. `config` is resolved, the folder locked.

    `arrange` may change what the processes are started with.
    """
    from shardlane.cli.cluster import Cluster, service_commands

    proposed = folder.write_config(config, folder.path / "config.proposed.toml")
    commands = arrange(service_commands(config, folder, proposed, fork=fork))
    cluster = Cluster(config, folder, view, commands, attendant)
    try:
        # The coordinator may refuse it; the folder then still says what its checkpoints were made with.
        status = cluster.run(on_accepted=lambda: folder.write_config(config))
    finally:
        proposed.unlink(missing_ok=True)
    return status, cluster.complaint


def open_data(config: Config, folder: RunFolder, note: Callable[[str], None]) -> TokenFolder:
    """The run's data, prepared if it has none of its own yet. Raises `DataError`.

    Data elsewhere is prepared by `shardlane prepare` alone: a misspelt `data.path` must not train on something else.
    """
    from shardlane.prepare import ensure_prepared
    from shardlane.token_cache import open_tokens

    if config.data.path:
        return open_tokens(config)
    return ensure_prepared(config, folder.path, note)


def resolve(config: Config, folder: RunFolder) -> Config:
    """With paths that hold wherever the run is looked at from."""
    from shardlane.storage import locate

    checkpoints = config.checkpoint.path and str(locate(config.checkpoint.path))
    return config.with_changes({"data.path": str(folder.data(config)), "checkpoint.path": checkpoints})


def is_finished(config: Config, folder: RunFolder) -> bool:
    """Whether a checkpoint of this very mathematics is as far as the config wants to go."""
    from shardlane.manifest import newest_complete, read_manifest

    checkpoint = newest_complete(folder.checkpoints(config))
    if checkpoint is None or config.checkpoint.resume == "never":
        return False
    manifest = read_manifest(checkpoint)
    return manifest.num_steps >= config.train.last_step and manifest.mathematics_hash == config.mathematics_hash()
