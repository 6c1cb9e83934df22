"""`shardlane`, or `python -m shardlane.cli`. Commands import what they need when they run, so that help comes at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is imported; we start processes, and never fork

import typer

from shardlane.cli import (
    certs,
    chaos,
    control,
    digest,
    export,
    generate,
    join_token,
    ledger,
    local,
    prepare,
    reference,
    size,
    status,
    top,
    version,
)
from shardlane.errors import ShardlaneError

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="shardlane",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Trains Transformer language models with parameter shards and pipeline stages; the bits do not depend on how many.\n\n"
    "Begin with [bold]shardlane local configs/tiny.toml --run-dir runs/tiny[/bold], a few seconds on one machine.",
)
for module in (
    local,
    chaos,
    reference,
    prepare,
    size,
    status,
    top,
    control,
    digest,
    ledger,
    export,
    generate,
    certs,
    join_token,
    version,
):
    module.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. What a person can mend is one line on stderr and status 2; a bug keeps its traceback."""
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="shardlane", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ShardlaneError as error:
        return _complain(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # `shardlane status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _CLICK_ERROR as error:
        message = error.format_message()  # type: ignore[attr-defined]  # of click's exceptions
        if error.__class__.__name__ == "NoArgsIsHelpError":
            print(message)
            return 0
        return _complain(f"{message.rstrip('.')}; see `{_command_of(error)} --help`", 2)


# Typer brings a click of its own, or stands on the real one; either way this is its ClickException.
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def _command_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "shardlane"


def _complain(message: str, status: int) -> int:
    print(f"shardlane: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
