"""`shardlane pause | resume | checkpoint | stop`: what a running run is to do."""

from __future__ import annotations

from collections.abc import Callable

import typer

from shardlane.cli.arguments import Certs, RunTarget

ACTIONS = {
    "pause": "Hold the run: no replica begins another step. Members stay, and nothing is lost.",
    "resume": "Let a paused run go on.",
    "checkpoint": "Take a checkpoint of the next version that is published.",
    "stop": "End the run after the next version, with a checkpoint; `shardlane local` goes on from there.",
}


def register(app: typer.Typer) -> None:
    for action, help in ACTIONS.items():
        epilog = f"[bold]Example[/bold]\n\nshardlane {action} runs/demo"
        app.command(action, help=help, epilog=epilog)(_command(action))


def _command(action: str) -> Callable[..., None]:
    def command(target: RunTarget, certs: Certs = None) -> None:
        from shardlane.cli.client import connect, network_of, state_name

        with connect(target, network_of(certs)) as client:
            state = client.control(f"CONTROL_ACTION_{action.upper()}")
        print(f"asked to {action}; the run is {state_name(state)}")

    return command
