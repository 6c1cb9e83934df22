"""Arguments that commands share, and the settings of the config that any of them takes as `--section.key value`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from shardlane.config import Config

_TOP_LEVEL_KEYS = ("--run_name", "--run-name")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's settings, TOML or YAML; configs/ has recipes.")]
RunDir = Annotated[Path, typer.Option("--run-dir", metavar="DIR", help="The run's folder; made if missing, taken up if there.")]
RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, as given to --run-dir.")]
RunOrUri = Annotated[
    str,
    typer.Argument(metavar="RUN_DIR|URI", help="Folder of a run, or its checkpoint.path by URI: s3://, gs://, az://, file://."),
]
DataPlace = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR|URI", help="Where the run's data are, for their tokenizer; default: as it had them."),
]
RunTarget = Annotated[str, typer.Argument(metavar="RUN_DIR|ADDRESS", help="A run's folder, or its coordinator's host:port.")]
RunTargetOrUri = Annotated[
    str,
    typer.Argument(
        metavar="RUN_DIR|ADDRESS|URI", help="A run's folder, its coordinator's host:port, or the URI of its checkpoints."
    ),
]
Certs = Annotated[
    Path | None,
    typer.Option(
        "--certs", metavar="DIR", envvar="SHARDLANE_CERTS", help="Folder of `shardlane certs`: speak mutual TLS, as the operator."
    ),
]
Step = Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="Which checkpoint; default: the newest.")]
Stages = Annotated[int | None, typer.Option("--stages", metavar="P", help="Pipeline stages.")]
Replicas = Annotated[int | None, typer.Option("--replicas", metavar="R", help="Chains of workers, one a stage.")]
Shards = Annotated[int | None, typer.Option("--shards", metavar="S", help="Parameter shards.")]
ForkRun = Annotated[
    bool, typer.Option("--fork-run", help="Go on from the checkpoint although the mathematics changed: another run.")
]


class ConfigCommand(TyperCommand):
    """A command that keeps `--section.key value` for the config, wherever it stands; `ctx.obj` is the list of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest, ctx.obj = split_overrides(args)
        return super().parse_args(ctx, rest)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command's own arguments, the config's): `["a.toml", "--train.seed", "3"]` → `["a.toml"], ["--train.seed", "3"]`."""
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, _ = argument.partition("=")
        if not key.startswith("--") or ("." not in key and key not in _TOP_LEVEL_KEYS):
            own.append(argument)
            continue
        overrides.append(argument)
        if not equals and (value := next(rest, None)) is not None:
            overrides.append(value)
    return own, overrides


def load_config(context: typer.Context, file: Path, flags: Mapping[str, int | None] | None = None) -> Config:
    """File < environment < `--section.key` < `flags`, such as {"cluster.stages": 2}. Raises `ConfigError`."""
    from shardlane import config as configs

    given = [f"--{key}={value}" for key, value in (flags or {}).items() if value is not None]
    return configs.load(file, [*(context.obj or ()), *given], os.environ)
