"""The wire's contract: the protos pass buf's lint, and the checked-in code is what they generate."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_protos_pass_buf_lint(repository: Path, tmp_path: Path) -> None:
    buf = Path(sys.executable).parent / "buf"
    # The protos import each other as shardlane/pb/….proto, so that is where they are laid for the linter.
    shutil.copytree(repository / "protos", tmp_path / "shardlane" / "pb")
    found = subprocess.run(
        [buf, "lint", tmp_path, "--config", repository / "buf.yaml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_generated_code_is_fresh(repository: Path, tmp_path: Path) -> None:
    if not list((repository / ".venv-proto").glob(".setup-*")):
        pytest.skip("there is no .venv-proto to generate with; `make check` and `make proto` make it")
    made = subprocess.run(
        ["make", "proto", f"PROTO_OUT={tmp_path}"], cwd=repository, capture_output=True, text=True, timeout=100, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    fresh = generated(tmp_path / "shardlane" / "pb")
    assert fresh, "nothing was generated"
    checked_in = generated(repository / "shardlane" / "pb")
    assert checked_in.keys() == fresh.keys(), "run `make proto`, and delete what no proto makes any more"
    assert [name for name in fresh if checked_in[name] != fresh[name]] == [], "run `make proto`"


def test_every_proto_has_its_code(repository: Path) -> None:
    """Holds where the generator is not installed, too."""
    protos = sorted(file.stem for file in (repository / "protos").glob("*.proto"))
    assert protos
    for stem in protos:
        assert importlib.util.find_spec(f"shardlane.pb.{stem}_pb2"), f"protos/{stem}.proto has no code: run `make proto`"


def generated(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for pattern in ("*_pb2*.py", "*_pb2*.pyi") for file in sorted(folder.glob(pattern))}
