"""`shardlane chaos`: a local cluster whose processes die on a schedule, and the proof that it did not matter."""

from __future__ import annotations

import json as json_format
import sys
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from shardlane.cli.arguments import ConfigCommand, Replicas, RunDir, Shards, Stages, load_config
from shardlane.errors import UserError

if TYPE_CHECKING:
    from shardlane.chaos.report import Report
    from shardlane.chaos.schedule import Schedule, Shape
    from shardlane.cli.run_folder import RunFolder
    from shardlane.config import Config

EPILOG = """[bold]Examples[/bold]

shardlane chaos    [dim]# about a minute: every role is killed once[/dim]

shardlane chaos configs/tiny.toml --run-dir runs/chaos --stages 3 --faults 5 --kinds kill,stop --check

shardlane chaos --seconds 300 --worker-mtbf 10 --shard-mtbf 15 --coordinator-mtbf 30 --json chaos.json

shardlane chaos --pairs worker+shard,shard+coordinator --faults 3

Any setting of the config is an option, --section.key value."""

DEFAULT_FAULTS = 1  # of every group, if neither --faults nor --seconds is given
ENDLESS_STEPS = "1000000"  # the schedule of faults ends the run, not its config

Choice = TypeVar("Choice", bound=StrEnum)


def register(app: typer.Typer) -> None:
    app.command("chaos", cls=ConfigCommand, epilog=EPILOG)(chaos)


def chaos(
    context: typer.Context,
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="The run's settings, TOML or YAML; default: a tiny model.")
    ] = None,
    run_dir: RunDir = Path("runs/chaos"),
    stages: Stages = None,
    replicas: Replicas = None,
    shards: Shards = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the faults; the same seed, the same faults.")] = 0,
    faults: Annotated[
        int | None, typer.Option("--faults", min=1, metavar="N", help="Faults of every kind and role; workers count by stage.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0, metavar="T", help="Faults come for so long.")] = None,
    worker_mtbf: Annotated[
        float, typer.Option("--worker-mtbf", min=0, metavar="SECONDS", help="Mean time from a whole cluster to a fault; 0: none.")
    ] = 4.0,
    shard_mtbf: Annotated[float, typer.Option("--shard-mtbf", min=0, metavar="SECONDS", help="The same, of shards.")] = 6.0,
    coordinator_mtbf: Annotated[
        float, typer.Option("--coordinator-mtbf", min=0, metavar="SECONDS", help="The same, of the coordinator.")
    ] = 10.0,
    kinds: Annotated[
        str, typer.Option("--kinds", metavar="LIST", help="Of kill, stop, half-open; stop hangs and comes back.")
    ] = "kill",
    pairs: Annotated[
        str, typer.Option("--pairs", metavar="LIST", help="Two kills at once: of worker+shard, shard+coordinator, shard+backup.")
    ] = "",
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there, too.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if a promise was broken; see below.")] = False,
) -> None:
    """Kill, stop and cut off the processes of a local cluster, one fault after another, and show what it cost.

    Each fault waits until the cluster is whole again after the one before. In the end the run stops with a checkpoint, the
    reference trains to the same step in one process, DIR/reference, and the two digests are compared.

    --check fails if the digests differ, a step was rolled back, a fault was not recovered from, or recovery from the death of
    workers or shards took longer than 2 s (median) or 5 s (95 %).
    """
    from shardlane.chaos.schedule import Kind, Pair, Schedule
    from shardlane.cli.run_folder import RunFolder
    from shardlane.process import prepare_process

    flags = {"cluster.stages": stages, "cluster.replicas": replicas, "cluster.shards": shards}
    context.obj = ["--train.max_steps", ENDLESS_STEPS, *(context.obj or ())]
    config = load_config(context, config_file or Path(__file__).parents[1] / "chaos" / "chaos.toml", flags)
    schedule = Schedule(
        shape_of(config),
        {"worker": worker_mtbf, "shard": shard_mtbf, "coordinator": coordinator_mtbf},
        seed,
        parse_list(kinds, Kind, "--kinds"),
        parse_list(pairs, Pair, "--pairs"),
        faults if faults is not None or seconds is not None else DEFAULT_FAULTS,
    )
    prepare_process(config.numerics.threads)  # before torch is imported
    report = trouble(config, RunFolder(run_dir), schedule, seconds)
    raise typer.Exit(conclude(report, json, check=check))


def parse_list(text: str, choices: type[Choice], option: str) -> list[Choice]:
    """Of names with commas between. Raises `UserError`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [choice.value for choice in choices]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name!r} is none of {', '.join(known)}")
    return [choices(name) for name in dict.fromkeys(names)]


def shape_of(config: Config) -> Shape:
    from shardlane.chaos.schedule import Shape

    cluster = config.cluster
    return Shape(cluster.stages, cluster.replicas, cluster.shards, cluster.num_copies(cluster.shards))


def trouble(config: Config, folder: RunFolder, schedule: Schedule, seconds: float | None) -> Report:
    """Trains until the faults are over, then compares. Raises `UserError`."""
    from shardlane.chaos.drill import Drill
    from shardlane.chaos.injector import Injector
    from shardlane.chaos.relay import Relays
    from shardlane.chaos.report import Report
    from shardlane.chaos.schedule import Kind
    from shardlane.chaos.watch import Watch
    from shardlane.cli.live import choose_view
    from shardlane.cli.local import is_finished, open_data, resolve, run_cluster

    with folder.lock():
        if is_finished(config, folder):
            raise UserError(f"{folder.path} is finished; give another --run-dir, or raise train.max_steps")
        names = ["coordinator", *(f"shard-{index}" for index in range(schedule.shape.shards))]
        watch = Watch({name: folder.ready_file(name) for name in names})
        relays = Relays()
        injector = Injector(folder, relays)
        drill = Drill(schedule, watch, injector, seconds=seconds)
        arrange = injector.behind_relays if Kind.HALF_OPEN in schedule.kinds else lambda commands: commands
        began = time.monotonic()
        with choose_view(every_steps=config.log.every_steps, last_step=config.train.last_version) as view:
            open_data(config, folder, view.note)
            config = resolve(config, folder)
            with watch, relays:
                status, complaint = run_cluster(config, folder, view, attendant=drill, arrange=arrange)
        print(*complaint, sep="\n", end="\n" if complaint else "", file=sys.stderr, flush=True)
        if status:
            drill.failure = drill.failure or f"the run ended with status {status}"
        report = Report(settings_of(schedule), drill.outcomes, time.monotonic() - began, drill.failure)
        if folder.newest_version(config) is not None:
            compare(config, folder, report)
        return report


def compare(config: Config, folder: RunFolder, report: Report) -> None:
    """Trains the reference to the run's last version, and notes both digests."""
    from shardlane.cli.live import choose_view
    from shardlane.cli.local import open_data
    from shardlane.cli.reference import order_of, train
    from shardlane.cli.run_folder import RunFolder
    from shardlane.digest import checkpoint_digest

    report.version, checkpoint = folder.checkpoint(config)
    report.digest = checkpoint_digest(checkpoint)
    oracle = RunFolder(folder.path / "reference")
    order, stop_at_step = None, int(report.version)
    if config.train.goes_by_turns:
        order, stop_at_step = order_of(config, folder.ledger_file, report.version), 0
    config = config.with_changes({"train.stop_at_step": stop_at_step, "checkpoint.path": ""})
    with oracle.lock(), choose_view(every_steps=config.log.every_steps, last_step=report.version) as view:
        view.note(f"the reference trains to version {report.version} in one process")
        if oracle.newest_version(config) != report.version:
            train(config, oracle, open_data(config, oracle, view.note), view, fork=False, order=order)
    version, checkpoint = oracle.checkpoint(config)
    if version == report.version:  # else it was interrupted
        report.reference_digest = checkpoint_digest(checkpoint)


def settings_of(schedule: Schedule) -> dict[str, Any]:
    """What makes the same faults again."""
    return {
        "shape": asdict(schedule.shape),
        "seed": schedule.seed,
        "mean_seconds_between_faults": dict(schedule.mean_seconds),
        "kinds": list(schedule.kinds),
        "pairs": list(schedule.pairs),
        "faults_of_each_group": schedule.each,
    }


def conclude(report: Report, json: Path | None, *, check: bool) -> int:
    """Shows and writes the figures; the exit status. Raises `UserError`."""
    from rich.console import Console

    report.show(Console(width=None if sys.stdout.isatty() else 110))
    if json is not None:
        try:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(json_format.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {json}: {error.strerror}; give another --json") from error
    misses = report.misses()
    for miss in misses:
        print(f"shardlane chaos: {miss}", file=sys.stderr)
    return int(bool(misses) and check)
