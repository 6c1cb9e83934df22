"""`shardlane top`: where a run stands, as it goes on."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from shardlane.cli.arguments import Certs, RunTarget

if TYPE_CHECKING:
    from shardlane.cli.client import CoordinatorClient
    from shardlane.pb.coordinator_pb2 import GetStatusResponse

EPILOG = """[bold]Examples[/bold]

shardlane top runs/demo

shardlane top 10.0.0.5:7070 --certs certs --interval 2

Ctrl-C ends it; the run does not notice."""

POINTS = 128  # of the loss curve: more than a terminal is wide
_SCREEN, _NO_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # another screen without a cursor, and back
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def register(app: typer.Typer) -> None:
    app.command("top", epilog=EPILOG)(top)


def top(
    target: RunTarget,
    interval: Annotated[float, typer.Option("--interval", min=0.2, metavar="SECONDS", help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print plain text, and end: for scripts.")] = False,
    certs: Certs = None,
) -> None:
    """Watch a run on a terminal: progress, loss, goodput, who runs what, shards with their copies, and what has happened.

    Off a terminal it looks once.
    """
    from shardlane.cli.client import CoordinatorClient, address_of, network_of
    from shardlane.cli.screen import Paint, lines_of
    from shardlane.errors import UserError

    address = address_of(target)
    if address is None:
        raise UserError(f"no coordinator serves {target}; `shardlane status {target}` says what there is")
    with CoordinatorClient(address, network_of(certs)) as client:
        if once or not sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            print("\n".join(lines_of(client.status(points=POINTS), width=width, paint=Paint(False))))
            return
        _watch(client, interval)


def _watch(client: CoordinatorClient, interval: float) -> None:
    """Until Ctrl-C. Raises `UserError` if the coordinator refuses."""
    from shardlane.cli.screen import Paint, lines_of
    from shardlane.errors import UnreachableError

    status: GetStatusResponse | None = None
    heard_seconds = time.monotonic()
    sys.stdout.write(_SCREEN)
    try:
        while True:
            lost = ""
            try:
                status = client.status(timeout_seconds=max(1.0, interval), points=POINTS)
                heard_seconds = time.monotonic()
            except UnreachableError:
                lost = f"the coordinator does not answer; this is {time.monotonic() - heard_seconds:.0f} s old"
            size = shutil.get_terminal_size()
            paint = Paint(True)
            lines = [paint("bad", lost[: size.columns])] if lost else []
            if status is not None:
                lines += lines_of(status, width=size.columns, paint=paint, num_events=size.lines)
            shown = lines[: size.lines - 1]
            sys.stdout.write(_HOME + "".join(f"{line}{_REST_OF_LINE}\r\n" for line in shown) + _REST_OF_SCREEN)
            sys.stdout.flush()
            time.sleep(interval)
    except KeyboardInterrupt:
        return
    finally:
        sys.stdout.write(_NO_SCREEN)
        sys.stdout.flush()
