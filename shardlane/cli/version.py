"""`shardlane version`: what to name in a report of a fault."""

from __future__ import annotations

import platform

import typer


def register(app: typer.Typer) -> None:
    app.command("version")(version)


def version() -> None:
    """Print the versions of Shardlane, its protocol, Python, and the packages that decide bits and bytes."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from shardlane import __version__
    from shardlane.ids import PROTOCOL_VERSION

    print(f"shardlane {__version__} (protocol {PROTOCOL_VERSION}), Python {platform.python_version()}, {platform.machine()}")
    for package in ("torch", "grpcio", "protobuf", "tokenizers"):
        try:
            print(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
