"""`shardlane reference`: the same run in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import ConfigCommand, ConfigFile, ForkRun, RunDir, load_config

if TYPE_CHECKING:
    from shardlane.cli.live import View
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config
    from shardlane.data import TokenFolder
    from shardlane.turn_table import Order

EPILOG = """[bold]Example[/bold]: one truth

shardlane local configs/tiny.toml --run-dir runs/cluster --stages 2 --shards 2

shardlane reference configs/tiny.toml --run-dir runs/one

shardlane digest runs/cluster; shardlane digest runs/one    [dim]# the same line twice[/dim]"""


def register(app: typer.Typer) -> None:
    app.command("reference", cls=ConfigCommand, epilog=EPILOG)(reference)


LedgerOption = Annotated[
    Path | None,
    typer.Option("--ledger", help="Under ASP: RUN_DIR/ledger.jsonl of a cluster's run; lanes take turns as they did there."),
]


def reference(
    context: typer.Context, config_file: ConfigFile, run_dir: RunDir, fork_run: ForkRun = False, ledger: LedgerOption = None
) -> None:
    """Train in this one process, without services: the oracle that every cluster must agree with, bit for bit.

    Writes the same folder as `local`, and either goes on where the other has stopped. Ctrl-C once stops after the present step
    with a checkpoint. Under ASP the weights depend on the order in which lanes were ready; `--ledger` repeats it.
    """
    from shardlane.cli.ending import print_ending
    from shardlane.cli.live import choose_view
    from shardlane.cli.local import is_finished, open_data, resolve
    from shardlane.cli.run_folder import RunFolder
    from shardlane.process import prepare_process

    config = load_config(context, config_file)
    prepare_process(config.numerics.threads)  # before torch is imported
    folder = RunFolder(run_dir)
    with folder.lock():
        if not fork_run and is_finished(config, folder):
            print(f"{run_dir} is finished: version {config.train.last_step} is there")
        else:
            with choose_view(every_steps=config.log.every_steps, last_step=config.train.last_version) as view:
                tokens = open_data(config, folder, view.note)
                config = resolve(config, folder)
                order = order_of(config, ledger) if ledger is not None else None
                train(config, folder, tokens, view, fork=fork_run, order=order)
        print_ending(config, folder, sample=False)


def order_of(config: Config, ledger: Path, end: int | None = None) -> Order:
    """Under ASP, whose turn it was in a run, by its ledger, up to version `end`. Raises `UserError`."""
    from shardlane.errors import UserError
    from shardlane.ledger import Expected, judge
    from shardlane.turn_table import Order

    if not config.train.goes_by_turns:
        raise UserError(f"{ledger} tells nothing of a run under {config.train.consistency}: only asp has an order to repeat")
    try:
        with ledger.open("rb") as lines:
            account = judge(lines, Expected.of(config))
    except OSError as error:
        raise UserError(f"cannot read {ledger}: {error.strerror}") from error
    lanes = [each for each in account.lanes if each is not None]
    if account.faults or account.first_step:
        fault = account.faults[0] if account.faults else f"it begins at version {account.first_step}"
        raise UserError(f"{ledger} tells of no run that could be repeated: {fault}")
    return Order(lanes[:end], frozenset(each for each in account.restarts if each))


def train(config: Config, folder: RunFolder, tokens: TokenFolder, view: View, *, fork: bool, order: Order | None = None) -> None:
    """From the folder's newest checkpoint to the end, or to the first Ctrl-C. `prepare_process` comes before."""
    from shardlane import logs
    from shardlane.cli.rows import RowsFile
    from shardlane.cli.supervisor import Interrupts
    from shardlane.errors import CheckpointError
    from shardlane.manifest import newest_complete
    from shardlane.reference import Reference

    logs.configure(config.log, folder.logs / "reference.log", to_stderr=False, run=config.run_name, role="reference", rank=0)
    trainer = Reference(config, tokens, order=order)
    root = folder.checkpoints(config)
    if (newest := newest_complete(root)) is not None:
        if config.checkpoint.resume == "never":
            raise CheckpointError(f'{root} holds {newest.name} and checkpoint.resume is "never"; give another --run-dir')
        trainer.resume(newest, fork=fork)
        view.note(f"goes on from {newest}")
    folder.write_config(config)
    rows = RowsFile(folder.metrics_file, trainer.version)
    with Interrupts() as interrupts:
        for row in trainer.run(root):
            rows.append(row)
            view.show_rows([row])
            if interrupts.requested.is_set():
                view.note("stopping, with a checkpoint")
                trainer.save(root)
                break
