"""`shardlane ledger`: whether a run counted every micro-batch of every step exactly once, by its own records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import RunFolderArgument

if TYPE_CHECKING:
    from shardlane.ledger import Account

EPILOG = """[bold]Examples[/bold]

shardlane ledger runs/tiny

shardlane ledger runs/tiny --json | jq .roll_backs"""


def register(app: typer.Typer) -> None:
    app.command("ledger", epilog=EPILOG)(ledger)


def ledger(
    run_dir: RunFolderArgument,
    json: Annotated[bool, typer.Option("--json", help="The whole account as JSON: every fault, every roll-back.")] = False,
) -> None:
    """Prove from a run's own records that each micro-batch of each step was counted exactly once; say what is wrong if not.

    For every step the coordinator keeps one line in RUN_DIR/ledger.jsonl: how often the shards added each lane in, at the least \
and at the most, over all tables (one for each site of each chunk of the model). A lane owns the same micro-batches in every \
step. The line is made of the shards' commit records, so it holds whichever of them were killed. After a roll-back, entries of \
the steps that are trained again are superseded, and stay. Exit status: 0 if all is proved, 1 if something is wrong.
    """
    import json as json_format
    from dataclasses import asdict

    from shardlane.cli.run_folder import RunFolder
    from shardlane.errors import UserError
    from shardlane.ledger import Expected, judge

    folder = RunFolder(run_dir)
    config = folder.config()
    reached = folder.newest_version(config) or 0  # read first: a run under way writes entries before checkpoints
    try:
        with folder.ledger_file.open("rb") as lines:
            account = judge(lines, Expected.of(config), reached=reached)
            num_bytes = lines.tell()
    except OSError as error:
        raise UserError(
            f"cannot read {folder.ledger_file}: {error.strerror}; a cluster keeps a ledger as it trains (`shardlane local`)"
        ) from error
    if not account.num_entries and not account.faults:
        raise UserError(f"{folder.ledger_file} has no step yet; train one first")
    if json:
        print(json_format.dumps({**asdict(account), "num_bytes": num_bytes}, indent=2))
    else:
        print(_faults(account) if account.faults else _proof(account, num_bytes))
    raise typer.Exit(1 if account.faults else 0)


def _faults(account: Account) -> str:
    more = len(account.faults) - 1
    return account.faults[0] + (f"; {more:,} more, see --json" if more else "")


def _proof(account: Account, num_bytes: int) -> str:
    """`400 steps, 3,200 micro-batches of 4 lanes: each counted exactly once in all 38 tables; 73 bytes a step`."""
    first = f" from {account.first_step} on" if account.first_step else ""
    unused = {"skipped": account.num_skipped, "refused": account.num_refused}
    words = ", ".join(f"{count:,} {word}" for word, count in unused.items() if count)
    text = f"{_number(account.num_steps, 'step')}{first}{f' ({words})' if words else ''}"
    text += f", {_number(account.num_micro_batches, 'micro-batch')}"
    text += f" of {_number(account.expects.lanes, 'lane')}: each counted exactly once in all {account.expects.tables:,} tables"
    if account.roll_backs:
        superseded = _number(sum(each.num_superseded for each in account.roll_backs), "entry")
        began = ", ".join(f"timeline {each.timeline} began at version {each.version}" for each in account.roll_backs)
        text += f"; {superseded} superseded by {_number(len(account.roll_backs), 'roll-back')} ({began})"
    return f"{text}; {num_bytes / account.num_entries:.0f} bytes a step"


_PLURALS = {"micro-batch": "micro-batches", "entry": "entries"}


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun if count == 1 else _PLURALS.get(noun, noun + 's')}"
